"""Photometric operations on batches, as Pillow defines them: to the bit (ImageOps, ImageEnhance).

Most replace each value of a channel by another one: they return tables for ``look_up``. Of these, some follow from the
level alone; the host makes them, for levels B 1: whole numbers, B 256. Others need the images: B C 256 or B 1 256, on
their device. Colour and sharpness need other pixels or channels and return images. Images are uint8 B C H W (C = 3),
with one level each, shaped B 1 1 or B 1 1 1.
"""

import numpy as np
import torch
from torch import Tensor

from moa_train.data.counter import Floats, Whole

_VALUES = np.arange(256)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value v of image b and channel c by tables[b, c, v]."""
    values = images.flatten(2).long()
    return tables.to(torch.uint8).expand(*images.shape[:2], 256).gather(2, values).view_as(images)


def invert(level: Floats) -> Whole:
    """Table of the negative."""
    return np.broadcast_to(255 - _VALUES, (len(level), 256))


def posterize(bits: Floats) -> Whole:
    """Table that keeps the highest ``bits`` (whole, 0 to 8) of a value."""
    return _VALUES & (0xFF00 >> bits.astype(np.int64))


def solarize(threshold: Floats) -> Whole:
    """Table that inverts values from ``threshold`` on."""
    return np.where(threshold > _VALUES, _VALUES, 255 - _VALUES)


def solarize_add(amount: Floats) -> Whole:
    """Table that adds ``amount`` (rounded down) to values below 128."""
    return np.where(_VALUES < 128, np.minimum(_VALUES + amount.astype(np.int64), 255), _VALUES)


def brightness(factor: Floats) -> Whole:
    """Table that moves values away from black (0: black, 1: no change)."""
    return (_VALUES.astype(np.float32) * factor.astype(np.float32)).clip(0, 255).astype(np.int64)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Table that moves values away from the image's mean grey (0: grey, 1: no change)."""
    luma = grey(images)
    pixels = luma[0].numel()
    mean = (luma.sum((2, 3)) + pixels // 2) // pixels  # rounded
    return blend(mean.view(-1, 1, 1), _values(images), factor)


def autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Table that stretches each channel to the full range."""
    pixels = images.flatten(2)
    low, high = (extreme.double() for extreme in pixels.aminmax(dim=2, keepdim=True))
    values = _values(images)
    full = torch.tensor(255.0, dtype=torch.float64)  # as a tensor: a number would be multiplied by the reciprocal
    scale = full / (high - low).clamp(min=1)
    stretched = (values * scale - low * scale).clamp(0, 255).long()
    return torch.where(high > low, stretched, values)


def equalize(images: Tensor, level: Tensor) -> Tensor:
    """Table that spreads the values of each channel evenly over the range."""
    counts = histogram(images)
    below = counts.cumsum(2) - counts
    last = counts.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = (counts.sum(2, keepdim=True) - last) // 255
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, spread, _values(images))


def colour(images: Tensor, factor: Tensor) -> Tensor:
    """Images with colours moved away from grey (0: grey, 1: no change)."""
    return blend(grey(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Images moved away from a blurred copy (0: blurred, 1: no change); the outermost pixels stay."""
    if min(images.shape[-2:]) < 3:
        return images
    rows = images[..., :-2, :].short() + images[..., 1:-1, :] + images[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = images[..., 1:-1, 1:-1]
    result = images.clone()
    result[..., 1:-1, 1:-1] = blend(((sums + 4 * inner.short()) / 13 + 0.5).floor(), inner, factor)
    return result


def grey(images: Tensor) -> Tensor:
    """Return luma as Pillow computes it (ITU-R 601-2, 16 bits after the point): int32, B 1 H W."""
    red, green, blue = images.int().unbind(1)
    luma = (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000)
    return luma.bitwise_right_shift_(16).unsqueeze(1)


def histogram(images: Tensor) -> Tensor:
    """Count the values of each channel: int64, B C 256."""
    values = images.flatten(2).long()
    one = torch.ones((), dtype=torch.int64, device=images.device)  # expanded, as ones in memory cost most
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, values, one.expand_as(values))


def blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Go from ``start`` towards ``end`` and past it: uint8, rounded down, as ``Image.blend``."""
    return (start + factor * (end.float() - start)).clamp_(0, 255).to(torch.uint8)


def _values(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device).view(1, 1, 256)
