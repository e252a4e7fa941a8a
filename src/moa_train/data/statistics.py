"""Channel means and deviations of the data sets, of values in 0..1."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from moa_train.data.batch import Batch


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# Over the training images: ImageNet's as published with torchvision's models, the others by `moa-data stats`.
IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {
    "digits": Statistics((0.309, 0.309, 0.309), (0.349, 0.349, 0.349)),
    "cifar10": Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": IMAGENET,
    "folder": IMAGENET,
}


def channel_statistics(batches: Iterable[Batch]) -> Statistics:
    """Compute mean and deviation over all pixels of all images."""
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        values = batch.images.transpose(0, 1).flatten(1).double() / 255
        count += values.shape[1]
        total += values.sum(1)
        squares += values.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()))
