"""Random erasing (Zhong et al. 2017) with a normal random number for each pixel and channel."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moa_train.data.box import box_numbers, random_box
from moa_train.data.counter import Hashes, Purpose, normal, uniform

AREA = (0.02, 1 / 3)
RATIO = (0.3, 1 / 0.3)
_STARTS = 1 << 16


class RandomErasing:
    """Replace a random rectangle of some normalised images by noise.

    The noise of an image is a random piece of one fixed table: drawing it anew for every pixel would cost more than all
    the rest of the augmentation.

    Args:
        probability: that an image is erased.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self._noise = torch.empty(0)

    def __call__(self, images: Tensor, keys: Hashes) -> Tensor:
        """Erase in float images B C H W, in place."""
        if not self.probability:
            return images
        whether, where = uniform(keys, Purpose.ERASING, np.arange(2)[:, None])
        rows = np.flatnonzero(whether < self.probability)
        channels, height, width = images.shape[1:]
        numbers = box_numbers(keys[rows], Purpose.ERASING_BOX)
        pixels, noise = _to_slice(images), _to_slice(self._table(images))
        for place, row in enumerate(rows.tolist()):
            box = random_box((height, width), AREA, RATIO, numbers[place])
            start = int(where[row] * _STARTS)
            piece = noise[start : start + channels * box.height * box.width].reshape(channels, box.height, box.width)
            pixels[row, :, box.top : box.top + box.height, box.left : box.left + box.width] = piece
        return images

    def _table(self, like: Tensor) -> Tensor:
        length = like[0].numel() + _STARTS
        if len(self._noise) != length:
            self._noise = torch.from_numpy(normal(Purpose.ERASING, np.arange(length)))
        self._noise = self._noise.to(like, non_blocking=True)
        return self._noise


def _to_slice(tensor: Tensor) -> Any:
    """Return the same memory in what is sliced fastest: on a CPU, slices of arrays cost a fifth of those of tensors."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor
