"""One micro-batch on its way from the loader to the model."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_train.runtime.device import to_device

_VALUES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Batch:
    """Images of one size with the names of their samples.

    ``index``, ``epoch`` and ``repeat`` stay on the host wherever the images go: augmentation hashes them into
    decisions, and a decision taken on the device would make the host wait for it.

    Attributes:
        images: uint8, B C H W.
        labels: int64, B.
        index: int64, B; element of the data set.
        epoch: int64, B; pass over the data set.
        repeat: int64, B; copy of the sample within its pass.
        step: optimizer step; in evaluation the number of the chunk.
        micro: number of the micro-batch within the global batch; 0 in evaluation.
        unreadable: messages for files that could not be read and were replaced.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    epoch: Tensor
    repeat: Tensor
    step: int
    micro: int = 0
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with images and labels on ``device``."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """Return the batch with images and labels in page-locked memory, from where copies overlap with work."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def images_at_once(images: Tensor) -> int:
    """Return how many images of a batch to work on at a time: on a CPU as many as its caches hold, else all.

    What is larger is slow twice: each operation goes through memory, and for its result the system has to find new
    memory, page by page, every time.
    """
    if images.device.type != "cpu" or not images.numel():
        return max(1, len(images))
    return max(1, _VALUES_AT_ONCE // images[0].numel())


def send(numbers: NDArray[Any], like: Tensor) -> Tensor:
    """Return numbers of the host as a tensor on the device of ``like``; the host does not wait for it."""
    return to_device(torch.from_numpy(np.ascontiguousarray(numbers)), like.device)


def to_uint8(values: Tensor) -> Tensor:
    """Return floats in 0..255, rounded down, as uint8.

    By way of int16: straight to uint8, torch converts one number at a time on a CPU, and takes four times as long.
    """
    return values.to(torch.int16).to(torch.uint8)
