"""Channel means and standard deviations of images, for values in 0..1."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from moa_train.interfaces import Batch


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def channel_statistics(batches: Iterable[Batch]) -> Statistics:
    """Compute mean and standard deviation over all pixels of all images."""
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        values = batch.images.transpose(0, 1).flatten(1).double() / 255
        count += values.shape[1]
        total += values.sum(1)
        squares += values.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()))
