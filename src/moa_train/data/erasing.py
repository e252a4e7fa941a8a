"""Random erasing (Zhong et al. 2017) with a normal random number for each pixel and channel."""

import numpy as np
import torch
from torch import Tensor

from moa_train.data.batch import send
from moa_train.data.box import Box, box_numbers, random_box
from moa_train.data.counter import Hashes, Purpose, Whole, normal, uniform
from moa_train.runtime.device import to_device

AREA = (0.02, 1 / 3)
RATIO = (0.3, 1 / 0.3)
_STARTS = 1 << 16


class RandomErasing:
    """Replace a random rectangle of some normalized images with noise.

    The noise of an image is a random section of one fixed table, because drawing new noise for every pixel would take
    longer than the rest of the augmentation.

    Args:
        probability: probability that an image is erased.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self._noise = torch.empty(0)

    def __call__(self, images: Tensor, keys: Hashes) -> Tensor:
        """Erase rectangles of float images, B C H W, in place."""
        if not self.probability:
            return images
        whether, where = uniform(keys, Purpose.ERASING, np.arange(2)[:, None])
        rows = np.flatnonzero(whether < self.probability)
        channels, height, width = images.shape[1:]
        numbers = box_numbers(keys[rows], Purpose.ERASING_BOX)
        boxes = [random_box((height, width), AREA, RATIO, sample) for sample in numbers]
        starts = (where[rows] * _STARTS).astype(np.int64)
        if images.device.type != "cpu":
            return self._erase_at_once(images, rows, boxes, starts)
        pixels, noise = images.numpy(), self._table(images).numpy()  # slicing arrays is 5 times faster than tensors
        for row, box, start in zip(rows.tolist(), boxes, starts.tolist(), strict=True):
            piece = noise[start : start + channels * box.height * box.width].reshape(channels, box.height, box.width)
            pixels[row, :, box.top : box.top + box.height, box.left : box.left + box.width] = piece
        return images

    def _erase_at_once(self, images: Tensor, rows: Whole, boxes: list[Box], starts: Whole) -> Tensor:
        """Erase the same pixels with a number of operations that does not depend on the batch size."""
        if not boxes:
            return images
        channels, height, width = images.shape[1:]
        numbers = [(row, box.top, box.left, box.height, box.width) for row, box in zip(rows, boxes, strict=True)]
        table = send(np.column_stack([np.array(numbers), starts]), images)  # R 6
        row_R, top_R111, left_R111, height_R111, width_R111, start_R111 = (
            column if number == 0 else column.view(-1, 1, 1, 1) for number, column in enumerate(table.unbind(1))
        )
        y_R1H1 = torch.arange(height, device=images.device).view(1, 1, -1, 1) - top_R111
        x_R11W = torch.arange(width, device=images.device).view(1, 1, 1, -1) - left_R111
        c_1C11 = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
        inside_R1HW = (y_R1H1 >= 0) & (y_R1H1 < height_R111) & (x_R11W >= 0) & (x_R11W < width_R111)
        place_RCHW = (start_R111 + (c_1C11 * height_R111 + y_R1H1) * width_R111 + x_R11W).clamp_(min=0)
        noise = self._table(images)
        noise_RCHW = noise.take(place_RCHW.clamp_(max=len(noise) - 1))
        return images.index_copy_(0, row_R, torch.where(inside_R1HW, noise_RCHW, images.index_select(0, row_R)))

    def _table(self, like: Tensor) -> Tensor:
        length = like[0].numel() + _STARTS
        if len(self._noise) != length:
            self._noise = torch.from_numpy(normal(Purpose.ERASING, np.arange(length)))
        self._noise = to_device(self._noise, like.device).to(like.dtype)
        return self._noise
