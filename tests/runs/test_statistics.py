"""The tests of differences equal textbook formulas, and their intervals hold as often as they should."""

import math

import numpy as np
import pytest
from scipy import stats

from moa_train.runs.statistics import image_interval, mcnemar, paired_p, seed_interval


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 5), (9, 2), (2, 9), (30, 14)])
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_images(gained, lost):
    first = np.array([True] * gained + [False] * lost + [True] * 40 + [False] * 10)
    second = np.array([False] * gained + [True] * lost + [True] * 40 + [False] * 10)
    n, most = gained + lost, max(gained, lost)
    expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n)
    assert mcnemar(first, second) == (gained, lost, pytest.approx(expected))


@pytest.mark.parametrize("values", [np.array([-1.0, 0.0, 1.0]), None], ids=["hits", "losses"])
def test_the_interval_over_images_equals_scipys_bootstrap(values):
    generator = np.random.default_rng(1)
    differences = generator.choice(values, 3000, p=[0.1, 0.75, 0.15]) if values is not None else None
    if differences is None:
        differences = generator.standard_t(3, 3000) + 0.05
    found = image_interval(differences, 0.95)
    other = stats.bootstrap(
        (differences,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2), batch=200
    ).confidence_interval
    width = other.high - other.low
    assert found.mean == differences.mean()
    assert found.low == pytest.approx(other.low, abs=0.06 * width)
    assert found.high == pytest.approx(other.high, abs=0.06 * width)
    assert found == image_interval(differences, 0.95)
    wider = image_interval(differences, 0.99)
    assert wider.low < found.low
    assert wider.high > found.high


def test_equal_models_have_no_difference():
    found = image_interval(np.zeros(100), 0.95)
    assert (found.mean, found.low, found.high, found.excludes_zero) == (0, 0, 0, False)
    assert mcnemar(np.ones(9, bool), np.ones(9, bool)) == (0, 0, 1.0)


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_equal_results_of_all_seeds_say_nothing_about_the_noise(gain):
    """Their spread would be zero, or that of rounding, and every difference significant."""
    first, second = [60.1 + gain, 0.3 + 59.8 + gain], [60.1, 60.1]
    assert first[0] != first[1], "only by rounding"
    assert paired_p([a - b for a, b in zip(first, second, strict=True)]) is None
    assert seed_interval(first, second, [first, second, [7.0]], 0.95) is None
    found, p = seed_interval(first, second, [first, second, [7.0, 8.0]], 0.95)
    assert found.mean == pytest.approx(gain)
    assert p > 0.2


def test_the_difference_of_two_groups_is_students_t_test():
    first, second = [1.0, 2.0, 3.0], [2.5, 4.0, 5.5, 4.5]
    found, p = seed_interval(first, second, [first, second], 0.95)
    other = stats.ttest_ind(first, second)
    assert p == pytest.approx(other.pvalue)
    low, high = other.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_other_groups_tell_the_noise_between_seeds():
    """Three groups with a variance of 1 each, 2 degrees of freedom each: the one with a single seed adds nothing."""
    noisy = [[1.0, 2.0, 3.0], [11.0, 12.0, 13.0], [5.0, 6.0, 7.0]]
    found, p = seed_interval([9.0], [2.0], [*noisy, [9.0], [2.0]], 0.95)
    assert found.mean == 7
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 6) * math.sqrt(2))
    assert p == pytest.approx(2 * stats.t.sf(7 / math.sqrt(2), 6))
    assert seed_interval([9.0], [2.0], [[9.0], [2.0], []], 0.95) is None


def test_the_paired_test_equals_scipys():
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(stats.ttest_rel([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).pvalue)


@pytest.mark.parametrize("level", [0.95, 0.995])
@pytest.mark.parametrize("discordant", [5, 8, 11, 20])
def test_equal_models_rarely_seem_different(discordant, level):
    """Each discordant image is right in either model with probability 1/2: add the cases whose interval excludes 0."""
    rejected = 0.0
    for gained in range(discordant + 1):
        differences = np.zeros(360)
        differences[:gained], differences[gained:discordant] = 1, -1
        if image_interval(differences, level).excludes_zero:
            rejected += stats.binom.pmf(gained, discordant, 0.5)
    assert rejected < 1.2 * (1 - level)
    assert (rejected > 0) == (discordant >= 11 or (discordant == 8 and level == 0.95)), "as in McNemar's exact test"


@pytest.mark.parametrize("probabilities", [[0.1, 0.7, 0.2], [0.005, 0.98, 0.015], [0, 0.98, 0.02]])
def test_intervals_over_images_hold_as_often_as_they_should(probabilities):
    """Draw from a known distribution 300 times: about 285 of the 95% intervals contain its mean."""
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        differences = generator.choice([-1.0, 0.0, 1.0], 500, p=probabilities)
        found = image_interval(differences, 0.95)
        held += found.low <= probabilities[2] - probabilities[0] <= found.high
    assert 279 <= held <= 297
