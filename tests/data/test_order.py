import itertools

import numpy as np
import pytest

from moa_train.data.counter import permutation
from moa_train.data.order import Order, micro_batches
from moa_train.runtime.errors import UserError


def stream(length: int, seed: int, repeats: int) -> "itertools.chain[tuple[int, int, int]]":
    """Yield the (epoch, index, repeat) of each sample, computed one at a time."""

    def one_epoch(epoch: int) -> list[tuple[int, int, int]]:
        order = permutation(length, seed, epoch).tolist()
        return [(epoch, index, repeat) for index in order for repeat in range(repeats)]

    return itertools.chain.from_iterable(map(one_epoch, itertools.count()))


@pytest.mark.parametrize(("length", "batch_size", "repeats"), [(10, 4, 1), (7, 16, 1), (5, 6, 3), (1, 3, 2)])
def test_steps_cut_the_endless_stream(length: int, batch_size: int, repeats: int) -> None:
    order = Order(length, batch_size, seed=3, repeats=repeats)
    expected = stream(length, 3, repeats)
    for step in range(12):
        draw = order.step(step)
        got = list(zip(draw.epoch.tolist(), draw.index.tolist(), draw.repeat.tolist(), strict=True))
        assert got == list(itertools.islice(expected, batch_size))


def test_any_step_can_be_asked_for_first() -> None:
    late = Order(1000, 64, seed=1).step(10_000)
    after = Order(1000, 64, seed=1)
    for step in (0, 9_999, 3):
        after.step(step)
    assert np.array_equal(after.step(10_000).index, late.index)


def test_every_sample_is_seen_once_per_epoch() -> None:
    order = Order(50, 8, seed=0)
    draws = [order.step(step) for step in range(25)]  # 200 positions: four epochs
    seen = np.stack([np.concatenate([draw.epoch for draw in draws]), np.concatenate([draw.index for draw in draws])])
    assert len(np.unique(seen, axis=1).T) == 200


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_micro_batches_in_order(world_size: int) -> None:
    shares = [micro_batches(24, 4, rank, world_size) for rank in range(world_size)]
    assert [micro for share in shares for micro in share] == list(range(6))


@pytest.mark.parametrize(
    ("batch_size", "micro", "world_size", "hint"),
    [
        (96, 36, 1, "32, 48"),
        (10, 11, 1, "Nearest values that do: 10"),
        (12, 4, 2, "Nearest engine.micro_batch_size: 3, 6"),
        (10, 5, 4, "Nearest engine.batch_size: 8"),
        (96, 8, 5, r"ranks: 1, 2, 3, 4, 6, 12\. A new run can also use another batch size\. .*batch_size: 95"),
    ],
)
def test_batches_that_do_not_divide_are_errors_with_the_nearest_that_do(
    batch_size: int, micro: int, world_size: int, hint: str
) -> None:
    with pytest.raises(UserError, match=hint):
        micro_batches(batch_size, micro, 0, world_size)


def test_an_empty_training_split_is_an_error() -> None:
    with pytest.raises(UserError, match="The training split is empty"):
        Order(0, 1, 0)
