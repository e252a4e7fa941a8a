"""Stage 1 of augmentation, which workers run for each sample: from an image file to uint8 pixels of the input size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from moa_train.data.box import Box, box_numbers, random_box
from moa_train.data.counter import Floats, Hashes, Purpose
from moa_train.data.image import MAX_REDUCTION, EncodedImage
from moa_train.data.resample import resample
from moa_train.schema import AugmentConfig, DataConfig

_LARGE = 16  # largest enlarged image, relative to the area of size / ratio; larger ones are cropped first
_CHOICE = 16  # number of candidate pixels for the position of a cut
_MARGIN = 4  # pixels kept around a part because its enlargement depends on them; a bicubic filter reaches 2


class View(Protocol):
    """Interface of the classes that convert an image to pixels of a fixed size."""

    def numbers(self, keys: Hashes) -> Floats:
        """Draw the random numbers that B samples with these keys need."""
        ...

    def __call__(self, image: EncodedImage, numbers: Floats) -> Tensor:
        """Return the pixels of one sample, given its random numbers: uint8, 3 H W."""
        ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut out a random rectangle and resize it (Szegedy et al. 2015).

    Attributes:
        size: height and width of the result.
        scale: range of the rectangle's area relative to the image's, drawn uniformly.
        ratio: range of its width / height, drawn uniformly in the logarithm.
        interpolation: bilinear or bicubic.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str = AugmentConfig.interpolation

    def numbers(self, keys: Hashes) -> Floats:
        """Draw the random numbers of the rectangles: B 10 4."""
        return box_numbers(keys, Purpose.FILE_CROP)

    def __call__(self, image: EncodedImage, numbers: Floats) -> Tensor:
        """Cut out and resize: uint8, 3 H W."""
        box = random_box((image.height, image.width), self.scale, self.ratio, numbers)
        return resized_crop(image, box, self.size, self.interpolation)


@dataclass(frozen=True)
class CenterCrop:
    """Resize an image so that it just covers an area of size / ratio, then cut out its center.

    For square sizes this is the usual evaluation: the shorter side is resized to size / ratio (224 / 0.875 = 256).

    Attributes:
        size: height and width of the result.
        ratio: side of the crop relative to the side that the image is resized to.
        interpolation: bilinear or bicubic.
    """

    size: tuple[int, int]
    ratio: float = DataConfig.eval_crop
    interpolation: str = AugmentConfig.interpolation

    def numbers(self, keys: Hashes) -> Floats:
        """Return no random numbers: B 0."""
        return np.empty((len(keys), 0))

    def __call__(self, image: EncodedImage, numbers: Floats) -> Tensor:
        """Resize and cut out: uint8, 3 H W."""
        cover = [math.floor(side / self.ratio) for side in self.size]
        x_CHW = image.decode()
        resized = just_covering(cover, image.height, image.width)
        start = [round((whole - side) / 2) for whole, side in zip(resized, self.size, strict=True)]
        if math.prod(resized) > max(image.height * image.width, _LARGE * math.prod(cover)):
            x_CHW, resized, start = _crop_before(x_CHW, resized, start, self.size)
        x_CHW = resample(x_CHW[None], resized, self.interpolation)[0]
        return x_CHW[:, start[0] : start[0] + self.size[0], start[1] : start[1] + self.size[1]]


def just_covering(cover: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """Return the size to which an image is resized, keeping its aspect ratio, so that it just covers an area."""
    # Integer arithmetic, as in torchvision: one side gets exactly its cover's length, the other is rounded down.
    if cover[0] * width >= cover[1] * height:
        return cover[0], cover[0] * width // height
    return cover[1] * height // width, cover[1]


def _crop_before(
    x_CHW: Tensor, resized: tuple[int, int], start: list[int], size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int], list[int]]:
    """Cut out the part of a long, narrow image that is visible after enlargement and cropping.

    The cuts are close to pixel edges of the enlarged image, so the result differs from that of enlarging the full image
    by a small fraction of an enlarged pixel.

    Returns:
        The part, the size to resize it to, and the position of the crop in it.
    """
    parts, sizes, starts = list[slice](), list[int](), list[int]()
    for whole, full, first, side in zip(x_CHW.shape[1:], resized, start, size, strict=True):
        scale = full / whole
        low, high = math.floor(first / scale) - _MARGIN, math.ceil((first + side) / scale) + _MARGIN
        low = _nearest_edge(range(max(0, low - _CHOICE), max(0, low) + 1), scale)
        high = low + _nearest_edge(range(min(whole, high) - low, min(whole, high + _CHOICE) - low + 1), scale)
        parts.append(slice(low, high))
        sizes.append(round((high - low) * scale))
        starts.append(first - round(low * scale))
    return x_CHW[:, parts[0], parts[1]], (sizes[0], sizes[1]), starts


def _nearest_edge(places: range, scale: float) -> int:
    return min(places, key=lambda place: abs(place * scale - round(place * scale)))


def resized_crop(image: EncodedImage, box: Box, size: tuple[int, int], interpolation: str) -> Tensor:
    """Decode a rectangle of an image and resize it: uint8, 3 H W.

    If the rectangle is much larger than the result, a JPEG is decoded at a half, a quarter or an eighth of its size, as
    long as each side keeps at least twice the pixels of the result. The difference from decoding at full size is
    similar to that between two good resampling filters.
    """
    spare = min(box.height // (2 * size[0]), box.width // (2 * size[1]), MAX_REDUCTION)
    x_CHW = image.decode(reduction=1 << max(0, spare.bit_length() - 1))
    y, x = x_CHW.shape[1] / image.height, x_CHW.shape[2] / image.width
    rows = slice(round(box.top * y), round((box.top + box.height) * y))
    columns = slice(round(box.left * x), round((box.left + box.width) * x))
    return resample(x_CHW[None, :, rows, columns], size, interpolation)[0]
