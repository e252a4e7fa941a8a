"""Loaders: from a source and an order to micro-batches of uint8 images."""

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch

from moa_train.data.batch import Batch
from moa_train.data.order import Draw, Order, micro_batches
from moa_train.data.source import ArraySource, Source


class TrainLoader:
    """Endless micro-batches of one rank, in the order that (seed, step) alone decides."""

    def __init__(
        self,
        source: Source,
        *,
        order: Order,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.source, self.order, self.micro_batch_size = source, order, micro_batch_size
        self.share = micro_batches(order.batch_size, micro_batch_size, rank, world_size)
        self.workers, self.pin_memory = workers, pin_memory

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches of step ``start_step``, of the next step, and so on for ever."""
        for step in count(start_step):
            draw = self.order.step(step)
            for micro in self.share:
                part = draw[micro * self.micro_batch_size : (micro + 1) * self.micro_batch_size]
                batch = _gather(self.source, part, step, micro)
                yield batch.pin_memory() if self.pin_memory else batch


class EvalLoader:
    """Every sample once, in chunks whose composition depends on neither ranks nor workers."""

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.source, self.batch_size, self.rank, self.world_size = source, batch_size, rank, world_size
        self.workers, self.pin_memory = workers, pin_memory

    def __len__(self) -> int:
        return len(range(self.rank, -(-len(self.source) // self.batch_size), self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        for chunk in range(self.rank, -(-len(self.source) // self.batch_size), self.world_size):
            index = np.arange(chunk * self.batch_size, min((chunk + 1) * self.batch_size, len(self.source)))
            zeros = np.zeros_like(index)
            batch = _gather(self.source, Draw(zeros, index, zeros), chunk, 0)
            yield batch.pin_memory() if self.pin_memory else batch


def _gather(source: Source, draw: Draw, step: int, micro: int) -> Batch:
    assert isinstance(source, ArraySource)
    return Batch(
        images=source.gather(draw.index),
        labels=torch.from_numpy(source.labels[draw.index]),
        index=torch.from_numpy(draw.index),
        epoch=torch.from_numpy(draw.epoch),
        repeat=torch.from_numpy(draw.repeat),
        step=step,
        micro=micro,
    )
