"""Random erasing (Zhong et al. 2017) with a normal random number for each pixel and channel."""

import numpy as np
import torch
from torch import Tensor

from moa_train.data.box import random_boxes
from moa_train.data.counter import Hashes, Purpose, normal, uniform

AREA = (0.02, 1 / 3)
RATIO = (0.3, 1 / 0.3)
_OFFSETS = 1 << 16


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
        numbers = uniform(keys[:, None], Purpose.ERASING, 0, np.arange(2))
        rows = np.flatnonzero(numbers[:, 0] < self.probability)
        if not len(rows):
            return images
        device, (channels, height, width) = images.device, images.shape[1:]
        boxes = random_boxes((height, width), AREA, RATIO, keys[rows], Purpose.ERASING)
        top, left, high, wide = torch.from_numpy(np.stack(boxes)[:, :, None]).to(device, non_blocking=True)
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        in_rows, in_columns = (y >= top) & (y < top + high), (x >= left) & (x < left + wide)
        inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]

        places = torch.from_numpy(rows).to(device, non_blocking=True)
        offsets = torch.from_numpy((numbers[rows, 1] * _OFFSETS).astype(np.int64)).to(device, non_blocking=True)
        pieces = self._table(channels * height * width, images).unfold(0, channels * height * width, 1)
        noise = pieces[offsets].view(-1, channels, height, width)
        images[places] = torch.where(inside, noise, images[places])
        return images

    def _table(self, length: int, like: Tensor) -> Tensor:
        if len(self._noise) != length + _OFFSETS:
            self._noise = torch.from_numpy(normal(Purpose.ERASING, np.arange(length + _OFFSETS)))
        self._noise = self._noise.to(like)
        return self._noise
