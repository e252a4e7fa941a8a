"""One micro-batch of images with labels, and functions for work on batches."""

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
    """Images of one size, their labels, and the identity of their samples.

    ``index``, ``epoch`` and ``repeat`` always stay on the host: augmentation derives its decisions from them, and
    decisions on the device would make the host wait for it.

    Attributes:
        images: uint8, (B, C, H, W).
        labels: int64, (B,).
        index: int64, (B,); position of each sample in the data set.
        epoch: int64, (B,); epoch of each sample.
        repeat: int64, (B,); number of the sample's repetition within its epoch (``augment.repeats``).
        step: optimizer step; in evaluation, the number of the chunk.
        micro: number of the micro-batch within the global batch; 0 in evaluation.
        unreadable: messages about files that could not be read and were replaced.
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
        """Return the batch with images and labels in page-locked memory, from which copies run asynchronously."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def images_at_once(images: Tensor) -> int:
    """Return how many images of a batch to process at a time: on a CPU as many as fit into its caches, else all.

    Larger tensors are slow on a CPU for two reasons: every operation reads and writes main memory, and the system has
    to map new pages for every result.
    """
    if images.device.type != "cpu" or not images.numel():
        return max(1, len(images))
    return max(1, _VALUES_AT_ONCE // images[0].numel())


def send(numbers: NDArray[Any], like: Tensor) -> Tensor:
    """Return an array as a tensor on the device of ``like``, copied without making the host wait."""
    return to_device(torch.from_numpy(np.ascontiguousarray(numbers)), like.device)


def to_uint8(values: Tensor) -> Tensor:
    """Return floats in 0..255, rounded down, as uint8.

    The detour over int16 is four times as fast on a CPU, because torch doesn't vectorize the conversion to uint8.
    """
    return values.to(torch.int16).to(torch.uint8)
