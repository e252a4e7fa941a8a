"""Random rectangles of pixels."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moa_train.data.counter import Hashes, Purpose, uniform
from moa_train.runtime.errors import UserError

Whole = NDArray[np.int64]
_TRIES = 10


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class Boxes(NamedTuple):
    """Rectangles, one per entry."""

    top: Whole
    left: Whole
    height: Whole
    width: Whole

    def at(self, place: int) -> Box:
        """Return one of them."""
        return Box(*(int(field[place]) for field in (self.top, self.left, self.height, self.width)))


def random_boxes(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    keys: Hashes,
    purpose: Purpose,
) -> Boxes:
    """Draw rectangles of random area and shape; of ten tries the first that fits.

    Where none fits, it is the largest central one whose shape is in range.

    Args:
        size: height and width of the images.
        scale: range of the area as a part of the image's; uniform.
        ratio: range of width / height; uniform in the logarithm.
        keys: of B samples.
        purpose: of the draws.
    """
    numbers = uniform(keys[:, None, None], purpose, *np.ogrid[:_TRIES, :4])
    area, shape, y, x = np.moveaxis(numbers, -1, 0)
    pixels = size[0] * size[1] * (scale[0] + area * (scale[1] - scale[0]))
    aspect = np.exp(math.log(ratio[0]) + shape * math.log(ratio[1] / ratio[0]))
    height, width = np.rint(np.sqrt(pixels / aspect)), np.rint(np.sqrt(pixels * aspect))
    fits = (height >= 1) & (height <= size[0]) & (width >= 1) & (width <= size[1])
    top, left = np.floor(y * (size[0] - height + 1)), np.floor(x * (size[1] - width + 1))

    rows, first = np.arange(len(keys)), fits.argmax(1)
    largest = _largest(size, ratio)
    return Boxes(
        *(
            np.where(fits.any(1), tries[rows, first], fallback).astype(np.int64)
            for tries, fallback in zip((top, left, height, width), largest, strict=True)
        )
    )


def check_ranges(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raise a UserError unless the ranges of area and shape are possible."""
    for what, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
        if not 0 < low <= high <= most:
            raise UserError(f"{what}={[low, high]}: a range needs 0 < low <= high <= {most:g}.")


def _largest(size: tuple[int, int], ratio: tuple[float, float]) -> Box:
    height = min(size[0], max(1, round(size[1] / ratio[0])))
    width = min(size[1], max(1, round(size[0] * ratio[1])))
    return Box((size[0] - height) // 2, (size[1] - width) // 2, height, width)
