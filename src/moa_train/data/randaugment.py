"""RandAugment (Cubuk et al. 2019) for whole batches, with the increasing severities that recipes write as ``inc1``.

Each of ``ops`` layers picks one of 15 operations for every image and applies it with probability 1/2, at a strength
drawn around ``magnitude`` (0 to 10). The images of a layer are sorted into four groups, each one pass: values replaced
by a table, colour, sharpness, affine maps.
"""

import math

import numpy as np
import torch
from torch import Tensor

from moa_train.data import photometric
from moa_train.data.counter import Floats, Hashes, Purpose, normal, uniform
from moa_train.data.geometry import warp
from moa_train.runtime.errors import UserError

MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5

TABLES = ("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "contrast", "brightness")
IMAGES = ("colour", "sharpness")
MAPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = TABLES + IMAGES + MAPS


def level_of(operation: str, strength: Floats, sign: Floats) -> Floats:
    """Return the argument of an operation.

    Args:
        operation: one of ``OPERATIONS``.
        strength: in 0..1.
        sign: -1 or 1, for operations that go both ways.

    Returns:
        Bits, a threshold, an amount, a factor, radians, a slope, or a part of the image's side.
    """
    match operation:
        case "posterize":
            return np.maximum(4 - np.floor(4 * strength), 1)  # 0 bits would leave a black image
        case "solarize":
            return 256 - np.floor(256 * strength)
        case "solarize_add":
            return np.floor(110 * strength)
        case "contrast" | "brightness" | "colour" | "sharpness":
            return np.maximum(1 + sign * 0.9 * strength, 0.1)
        case "rotate":
            return sign * math.radians(30) * strength
        case "shear_x" | "shear_y":
            return sign * 0.3 * strength
        case "translate_x" | "translate_y":
            return sign * 0.45 * strength
    return strength  # takes none


def affine_map(operation: str, level: float, height: int, width: int) -> list[list[float]]:
    """Return the map of a geometric operation, from places in the result to places in the image."""
    match operation:
        case "rotate":  # counter-clockwise about the centre
            cos, sin, x, y = math.cos(level), math.sin(level), width / 2, height / 2
            return [[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]]
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
        ops: layers, operations an image at most.
        magnitude: mean strength, 0 to 10.
        std: deviation of the strength.
        fill: values of places that come from outside the image, C.
    """

    def __init__(self, ops: int, magnitude: float, std: float, fill: Tensor) -> None:
        if ops < 0:
            raise UserError(f"randaugment_ops={ops}: must be 0 (off) or more. Usual: 2.")
        if not 0 <= magnitude <= MAX_MAGNITUDE:
            raise UserError(f"randaugment_magnitude={magnitude}: must lie between 0 and 10. Usual: 9.")
        if not std >= 0:
            raise UserError(f"randaugment_std={std}: must be at least 0. Usual: 0.5.")
        self.ops, self.magnitude, self.std, self.fill = ops, magnitude, std, fill

    def __call__(self, images: Tensor, keys: Hashes) -> Tensor:
        """Augment uint8 images B 3 H W, whose samples have these keys. May write into ``images``."""
        for layer in range(self.ops):
            chosen, levels = self.draw(keys, layer)
            images = self._apply(images, chosen, levels)
        return images

    def draw(self, keys: Hashes, layer: int) -> tuple[np.ndarray, Floats]:
        """Return for each image the place of its operation in ``OPERATIONS`` (-1: none) and the argument."""
        numbers = uniform(keys[:, None], Purpose.RANDAUGMENT, layer, np.arange(3))
        chosen = np.floor(numbers[:, 0] * len(OPERATIONS)).astype(np.int64)
        strength = self.magnitude + self.std * normal(keys, Purpose.RANDAUGMENT, layer, 3)
        strength = strength.clip(0, MAX_MAGNITUDE) / MAX_MAGNITUDE
        sign = np.where(numbers[:, 1] < 0.5, -1.0, 1.0)
        levels = np.select(
            [chosen == place for place in range(len(OPERATIONS))],
            [level_of(operation, strength, sign) for operation in OPERATIONS],
        )
        return np.where(numbers[:, 2] < PROBABILITY, chosen, -1), levels

    def _apply(self, images: Tensor, chosen: np.ndarray, levels: Floats) -> Tensor:
        for group, apply in ((TABLES, self._tables), (IMAGES, self._images), (MAPS, self._maps)):
            first = OPERATIONS.index(group[0])
            rows = np.flatnonzero((chosen >= first) & (chosen < first + len(group)))
            if len(rows):
                rows = rows[np.argsort(chosen[rows], kind="stable")]
                places = torch.from_numpy(rows).to(images.device, non_blocking=True)
                names = [OPERATIONS[place] for place in chosen[rows]]
                images[places] = apply(images[places], names, levels[rows])
        return images

    def _tables(self, images: Tensor, names: list[str], levels: Floats) -> Tensor:
        tables = torch.empty(*images.shape[:2], 256, dtype=torch.uint8, device=images.device)
        for name, part, level in _runs(names, levels, images.device):
            tables[part] = getattr(photometric, name)(images[part], level.view(-1, 1, 1))
        return photometric.look_up(images, tables)

    def _images(self, images: Tensor, names: list[str], levels: Floats) -> Tensor:
        for name, part, level in _runs(names, levels, images.device):
            images[part] = getattr(photometric, name)(images[part], level.view(-1, 1, 1, 1))
        return images

    def _maps(self, images: Tensor, names: list[str], levels: Floats) -> Tensor:
        size = images.shape[-2:]
        maps = [affine_map(name, level, *size) for name, level in zip(names, levels, strict=True)]
        self.fill = self.fill.to(images.device)
        return warp(images, torch.tensor(maps, dtype=torch.float32).to(images.device, non_blocking=True), self.fill)


def _runs(names: list[str], levels: Floats, device: torch.device) -> list[tuple[str, slice, Tensor]]:
    """Return each operation of a sorted list with its slice and its levels."""
    arguments = torch.from_numpy(levels.astype(np.float32)).to(device, non_blocking=True)
    starts = {name: names.index(name) for name in dict.fromkeys(names)}
    parts = {name: slice(start, start + names.count(name)) for name, start in starts.items()}
    return [(name, part, arguments[part]) for name, part in parts.items()]
