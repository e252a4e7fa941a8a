import math

import numpy as np
import pytest
from scipy import stats

from moa_train.data.counter import Purpose, hashes, normal, own_keys, permutation, sample_keys, uniform

MASK = (1 << 64) - 1


def reference(*words: int) -> int:
    """Return the same hash, computed with Python's unbounded integers."""
    state = 0
    for word in words:
        z = ((state + 0x9E3779B97F4A7C15) & MASK) ^ (word & MASK)
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        state = z ^ (z >> 31)
    return state


@pytest.mark.parametrize("words", [(0,), (1, 2, 3), (2**63 - 1, 5), (123456789, 0, 17, 3, 4)])
def test_hash_is_the_chained_finalizer(words: tuple[int, ...]) -> None:
    assert int(hashes(*words)[0]) == reference(*words)


def test_finalizer_is_that_of_splitmix64() -> None:
    # The first output of SplitMix64 for seed 0, as published with xoshiro's reference code.
    assert int(hashes(0)[0]) == 0xE220A8397B1DCDAF


def test_words_broadcast_like_arrays() -> None:
    table = hashes(7, np.arange(3)[:, None], np.arange(5))
    assert table.shape == (3, 5)
    assert int(table[2, 4]) == reference(7, 2, 4)


def test_negative_and_large_seeds_are_words_too() -> None:
    assert int(hashes(-1)[0]) == reference(MASK)


@pytest.mark.parametrize("axis", range(5))
def test_every_word_gives_uniform_independent_numbers(axis: int) -> None:
    words: list[int | np.ndarray] = [42, 3, 1000, 0, int(Purpose.FLIP)]
    words[axis] = np.arange(100_000)
    numbers = uniform(*words)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(len(numbers))


def test_purposes_are_independent_of_each_other() -> None:
    keys = sample_keys(0, 1, np.arange(50_000), 0)
    table = np.stack([uniform(keys, purpose) for purpose in Purpose])
    correlations = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlations).max() < 4.5 / math.sqrt(table.shape[1])


def test_one_changed_bit_changes_half_of_the_bits() -> None:
    words = np.arange(1000)
    for bit in (0, 1, 17, 40, 62):
        changed = hashes(5, words) ^ hashes(5, words ^ (1 << bit))
        ones = np.unpackbits(changed.view(np.uint8)).mean()
        assert ones == pytest.approx(0.5, abs=0.01)


def test_normal_is_normal() -> None:
    numbers = normal(1, np.arange(100_000))
    assert stats.kstest(numbers, "norm").pvalue > 1e-3


def test_permutation_holds_every_place_once_and_depends_on_each_word() -> None:
    order = permutation(1000, 3, 7)
    assert sorted(order) == list(range(1000))
    assert order.tolist() != permutation(1000, 3, 8).tolist()
    assert order.tolist() != permutation(1000, 4, 7).tolist()
    assert order.tolist() == permutation(1000, 3, 7).tolist()


def test_all_permutations_of_few_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        order = tuple(permutation(3, 0, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_numbers_never_change() -> None:
    # A run that is resumed by another version of the project must draw the same samples.
    assert permutation(8, 0, 0).tolist() == [0, 7, 1, 5, 4, 2, 6, 3]
    assert [purpose.value for purpose in Purpose] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert int(own_keys(np.array([1], np.uint64), "to_gray")[0]) == 14866994235350313932
