"""Photometric operations on batches, bit-identical to Pillow's (ImageOps, ImageEnhance).

Each operation takes uint8 images, B 3 H W, and one level per image, float32 B 1 1 1, and returns new uint8 images.
"""

import torch
from torch import Tensor

from moa_train.data.batch import to_uint8

_FULL = torch.tensor(255.0, dtype=torch.float64)  # torch computes number / tensor by the reciprocal


def invert(images: Tensor, level: Tensor) -> Tensor:
    """Return the negatives."""
    return ~images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``bits`` (integer, 1 to 8) of each value."""
    dropped = (8 - bits).to(torch.uint8)
    return (images >> dropped) << dropped


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values of at least ``threshold``."""
    return images ^ -(images >= threshold).to(torch.uint8)  # -1 is 255 in uint8: all bits are set


def solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Add ``amount`` (integer, at most 128) to values below 128, whose highest bit is 0."""
    return images + amount.to(torch.uint8) * (~images >> 7)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Move values away from black (0: black, 1: no change)."""
    return to_uint8((images * factor).clamp_(max=255))


def autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Stretch each channel to the full range."""
    pixels = images.flatten(2)
    low, high = pixels.amin(2, keepdim=True).double(), pixels.amax(2, keepdim=True).double()
    same = torch.arange(256, dtype=torch.float64, device=images.device)
    scale = _FULL / (high - low).clamp_(min=1)
    stretched = (same * scale).sub_(low * scale).clamp_(0, 255)
    return look_up(pixels.long(), torch.where(high > low, stretched, same)).view_as(images)


def equalize(images: Tensor, level: Tensor) -> Tensor:
    """Spread the values of each channel evenly over the range."""
    values = images.flatten(2).long()
    counts = histogram(values)
    below = counts.cumsum(2) - counts
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    same = torch.arange(256, device=images.device)
    return look_up(values, torch.where(step > 0, spread, same)).view_as(images)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move values away from the image's mean gray (0: gray, 1: no change)."""
    x_B3HW = images.float()
    mean = gray(x_B3HW).mean((1, 2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_()
    return blend(mean.float(), x_B3HW, factor)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Move colors away from gray (0: gray, 1: no change)."""
    x_B3HW = images.float()
    return blend(gray(x_B3HW), x_B3HW, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Move values away from a blurred copy (0: blurred, 1: no change), except in the outermost pixels."""
    if min(images.shape[-2:]) < 3:
        return images.clone()
    x_B3HW = images.float()
    inner = x_B3HW[..., 1:-1, 1:-1]
    rows = x_B3HW[..., :-2, :] + x_B3HW[..., 1:-1, :] + x_B3HW[..., 2:, :]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).add_(inner, alpha=4).div_(13).add_(0.5).floor_()
    result = images.clone()
    result[..., 1:-1, 1:-1] = blend(blurred, inner, factor)
    return result


def gray(x_B3HW: Tensor) -> Tensor:
    """Return luma as Pillow computes it (ITU-R 601-2, 16-bit fixed point): floats with integer values, B 1 H W."""
    red, green, blue = x_B3HW.unbind(1)  # the sums below are exact in float32
    luma = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return luma.add_(0.5).floor_().unsqueeze(1)


def blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Interpolate from ``start`` to ``end`` or extrapolate beyond: uint8, rounded down, like ``Image.blend``."""
    return to_uint8((end - start).mul_(factor).add_(start).clamp_(0, 255))


def histogram(values: Tensor) -> Tensor:
    """Count the values, int64 B C N in 0..255, of each channel: int64, B C 256."""
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(2, values, torch.ones_like(values))


def look_up(values: Tensor, tables: Tensor) -> Tensor:
    """Replace each value v of image b and channel c, int64 B C N, by tables[b, c, v]: uint8, B C N."""
    return tables.to(torch.uint8).gather(2, values)
