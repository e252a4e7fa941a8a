"""RandAugment (Cubuk et al. 2019) for batches, with increasing severities (``inc1`` in the names of common recipes).

Each of ``ops`` layers picks one of 15 operations for every image and applies it with probability 1/2, at a strength
drawn around ``magnitude`` (0 to 10). The images of a layer are sorted by operation, so that each operation works on a
slice of them. All affine maps are applied in one call.
"""

import math
from itertools import pairwise

import numpy as np
from torch import Tensor

from moa_train.data import photometric
from moa_train.data.affine import warp
from moa_train.data.batch import send
from moa_train.data.counter import Floats, Hashes, Purpose, Whole, normal, uniform
from moa_train.runtime.device import to_device
from moa_train.schema import AugmentConfig

MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5

PHOTOMETRIC = (
    "invert", "posterize", "solarize", "solarize_add", "brightness", "autocontrast", "equalize", "contrast", "color",
    "sharpness",
)  # fmt: skip
MAPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = PHOTOMETRIC + MAPS


def level_of(operation: str, strength: Floats, sign: Floats) -> Floats:
    """Return the argument of an operation.

    Args:
        operation: one of ``OPERATIONS``.
        strength: from 0 to 1.
        sign: -1 or 1, for operations with two directions.

    Returns:
        Bits, a threshold, an amount, a factor, radians, a slope, or a fraction of the image's side.
    """
    match operation:
        case "posterize":
            return np.maximum(4 - np.floor(4 * strength), 1)  # 0 bits would leave a black image
        case "solarize":
            return 256 - np.floor(256 * strength)
        case "solarize_add":
            return np.floor(110 * strength)
        case "contrast" | "brightness" | "color" | "sharpness":
            return np.maximum(1 + sign * 0.9 * strength, 0.1)
        case "rotate":
            return sign * math.radians(30) * strength
        case "shear_x" | "shear_y":
            return sign * 0.3 * strength
        case "translate_x" | "translate_y":
            return sign * 0.45 * strength
    return strength  # the other operations ignore it


def affine_map(operation: str, level: float, height: int, width: int) -> list[list[float]]:
    """Return the map of a geometric operation, from positions in the result to positions in the image."""
    match operation:
        case "rotate":  # counterclockwise about the center
            cos, sin, x, y = math.cos(level), math.sin(level), width / 2, height / 2
            return [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]
        case "shear_x":
            return [[1, level, 0], [0, 1, 0]]
        case "shear_y":
            return [[1, 0, 0], [level, 1, 0]]
        case "translate_x":
            return [[1, 0, level * width], [0, 1, 0]]
    return [[1, 0, 0], [0, 1, level * height]]


class RandAugment:
    """Random operations on batches of uint8 images.

    Args:
        config: number of layers (maximum operations per image), mean and standard deviation of the strength.
        fill: C values for pixels outside the image.
    """

    def __init__(self, config: AugmentConfig, fill: Tensor) -> None:
        self.ops, self.fill = config.randaugment_ops, fill
        self.magnitude, self.std = config.randaugment_magnitude, config.randaugment_std

    def __call__(self, images: Tensor, keys: Hashes) -> Tensor:
        """Augment uint8 images B 3 H W, whose samples have these keys."""
        layers = self.draw(keys)
        order = np.arange(len(keys))  # sorted by operation, so that each operation's images form a slice
        for chosen, strength, sign in zip(*layers, strict=True):
            by_operation = np.argsort(chosen[order], kind="stable")
            order = order[by_operation]
            images = images.index_select(0, send(by_operation, images))
            self._apply(images, chosen[order], strength[order], sign[order])
        return images.index_select(0, send(np.argsort(order), images))

    def draw(self, keys: Hashes) -> tuple[Whole, Floats, Floats]:
        """Return, for each layer and image, the operation's index in ``OPERATIONS`` (-1: none), strength and sign."""
        layers, last = np.arange(self.ops)[:, None], np.arange(3)[:, None, None]
        which, whether, direction = uniform(keys, Purpose.RANDAUGMENT, layers, last)
        strength = self.magnitude + self.std * normal(keys, Purpose.RANDAUGMENT, layers, 3)
        chosen = np.floor(which * len(OPERATIONS)).astype(np.int64)
        return (
            np.where(whether < PROBABILITY, chosen, -1),
            strength.clip(0, MAX_MAGNITUDE) / MAX_MAGNITUDE,
            np.where(direction < 0.5, -1.0, 1.0),
        )

    def _apply(self, images: Tensor, chosen: Whole, strength: Floats, sign: Floats) -> None:
        """Apply one layer in place; ``chosen`` is in ascending order."""
        names = ("none", *OPERATIONS)
        sizes = np.bincount(chosen + 1, minlength=len(names)).tolist()
        parts = zip(names, pairwise((0, *np.cumsum(sizes).tolist())), strict=True)
        levels = {name: level_of(name, strength[a:b], sign[a:b]) for name, (a, b) in parts}
        level_B111 = send(np.concatenate(list(levels.values())).astype(np.float32), images).view(-1, 1, 1, 1)
        for name, size, part, level in zip(names, sizes, images.split(sizes), level_B111.split(sizes), strict=True):
            if size and name in PHOTOMETRIC:
                part.copy_(getattr(photometric, name)(part, level))
        maps = [affine_map(name, level, *images.shape[-2:]) for name in MAPS for level in levels[name].tolist()]
        if maps:
            self.fill = to_device(self.fill, images.device)
            moved = images[-len(maps) :]  # affine operations come last
            moved.copy_(warp(moved, send(np.array(maps, np.float32), images), self.fill))
