"""Random rectangles of pixels."""

import math
from typing import NamedTuple

import numpy as np

from moa_train.data.counter import Floats, Hashes, Purpose, uniform

Range = tuple[float, float]
_TRIES = 10


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def box_numbers(keys: Hashes, purpose: Purpose) -> Floats:
    """Draw the random numbers for ``random_box`` for samples with these keys: float64, B 10 4."""
    return uniform(keys[:, None, None], purpose, *np.ogrid[:_TRIES, :4])


def random_box(size: tuple[int, int], scale: Range, ratio: Range, numbers: Floats) -> Box:
    """Choose a rectangle of random area and shape in an image.

    The result is the first of ten tries that fits, otherwise the largest centered rectangle whose shape is in range.

    Args:
        size: height and width of the image.
        scale: range of the area relative to the image's, drawn uniformly.
        ratio: range of width / height, drawn uniformly in the logarithm.
        numbers: the result of ``box_numbers`` for one sample, 10 4.
    """
    for area, shape, y, x in numbers.tolist():
        pixels = size[0] * size[1] * (scale[0] + area * (scale[1] - scale[0]))
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape
        height, width = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 1 <= height <= size[0] and 1 <= width <= size[1]:
            return Box(int(y * (size[0] - height + 1)), int(x * (size[1] - width + 1)), height, width)
    height = min(size[0], max(1, round(size[1] / ratio[0])))
    width = min(size[1], max(1, round(size[0] * ratio[1])))
    return Box((size[0] - height) // 2, (size[1] - width) // 2, height, width)
