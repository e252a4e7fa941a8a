"""Functions for work on batches of images."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_train.runtime.device import to_device

_VALUES_AT_ONCE = 1 << 21


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
