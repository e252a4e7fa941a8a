"""The order of the samples, as a pure function of (seed, step)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moa_train.data.counter import permutation
from moa_train.runtime.errors import UserError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """The identity of samples: epoch, position in the data set and repetition of each."""

    epoch: Indices
    index: Indices
    repeat: Indices

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice) -> "Draw":
        return Draw(self.epoch[part], self.index[part], self.repeat[part])


class Order:
    """An infinite stream of samples, divided into global batches that are always full.

    The stream is the concatenation of all epochs. Epoch e contains the data set, permuted by (seed, e), with each
    sample ``repeats`` times in a row (repeated augmentation, Hoffer et al. 2020). Step t takes the positions
    [t G, (t + 1) G), so no sample is ever dropped, and a batch may span two epochs. There is no state: any step can be
    computed directly.

    Args:
        length: number of samples in the data set, N.
        batch_size: size of the global batch over all ranks and micro-batches, G.
        seed: seed of the permutations.
        repeats: how often each sample occurs in an epoch, each time augmented differently.
    """

    def __init__(self, length: int, batch_size: int, seed: int, repeats: int = 1) -> None:
        if length < 1:
            raise UserError("The training split is empty. Check data.root.")
        self.length, self.batch_size, self.seed, self.repeats = length, batch_size, seed, repeats

    def step(self, step: int) -> Draw:
        """Return the G samples of an optimizer step."""
        return self.locate(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def locate(self, positions: Indices) -> Draw:
        """Return the samples at these positions of the stream."""
        epoch, within = np.divmod(positions, self.length * self.repeats)
        place, repeat = np.divmod(within, self.repeats)
        index = np.empty_like(place)
        for one in np.unique(epoch):
            inside = epoch == one
            index[inside] = _permuted(self.length, self.seed, int(one))[place[inside]]
        return Draw(epoch, index, repeat)


@lru_cache(maxsize=4)
def _permuted(length: int, seed: int, epoch: int) -> Indices:
    order = permutation(length, seed, epoch)
    order.flags.writeable = False  # all callers share the cached array
    return order


def micro_batches(batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """Return the numbers of a rank's micro-batches: a contiguous share of all batch_size / micro_batch_size.

    Raises:
        UserError: the micro-batch size does not divide the batch size, or the number of ranks does not divide the
            number of micro-batches.
    """
    if batch_size % micro_batch_size:
        near = _nearest([d for d in range(1, batch_size + 1) if batch_size % d == 0], micro_batch_size)
        raise UserError(
            f"engine.micro_batch_size={micro_batch_size} does not divide engine.batch_size={batch_size}. "
            f"Nearest values that do: {near}."
        )
    count = batch_size // micro_batch_size
    if count % world_size:
        valid = [d for d in range(1, batch_size + 1) if batch_size % (d * world_size) == 0]
        ranks = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
        fix = (
            f"Nearest engine.micro_batch_size: {_nearest(valid, micro_batch_size)}."
            if valid
            else f"Possible numbers of ranks: {ranks}. A new run can also use another batch size. "
            f"Nearest engine.batch_size: {max(1, round(batch_size / world_size)) * world_size}."
        )
        raise UserError(
            f"engine.batch_size={batch_size} makes {count} micro-batches of {micro_batch_size}, which cannot be "
            f"divided equally among {world_size} ranks. {fix}"
        )
    share = count // world_size
    return range(rank * share, (rank + 1) * share)


def _nearest(valid: list[int], value: int) -> str:
    below, above = [v for v in valid if v < value], [v for v in valid if v > value]
    return ", ".join(map(str, below[-1:] + above[:1]))
