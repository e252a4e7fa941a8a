"""Geometric operations on batches: padded crops, and one affine map per image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_train.data.batch import to_uint8


def pad_crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad images with zeros and crop them back to their size.

    Args:
        images: uint8, B C H W.
        padding: pixels on each side.
        top: int64, B, from 0 to 2 * padding; first row of the crop in the padded image.
        left: int64, B; first column.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    # Each row of a crop is a contiguous run of padded pixels that begins at `starts` (B C H). Copying runs is 5 to 15
    # times faster than indexing single pixels.
    planes = torch.arange(batch * channels, device=images.device).view(batch, channels, 1)
    corners = (planes * padded.shape[2] + top.view(-1, 1, 1)) * padded.shape[3] + left.view(-1, 1, 1)
    starts = corners + padded.shape[3] * torch.arange(height, device=images.device)
    return padded.flatten().unfold(0, width, 1).index_select(0, starts.flatten()).view_as(images)


def warp(images: Tensor, maps: Tensor, fill: Tensor | None = None, interpolation: str = "bilinear") -> Tensor:
    """Transform each image by an affine map.

    The pixel at (x, y) of the result has its center at (x + 1/2, y + 1/2) and shows the image at the position
    A (x + 1/2, y + 1/2, 1), interpolated between pixel centers. The fill surrounds the image.

    Args:
        images: uint8, B C H W.
        maps: float32, B 2 3; from positions in the result to positions in the image, in pixels, x first.
        fill: C values, float32, for positions outside the image; by default, they show the nearest pixel.
        interpolation: bilinear or bicubic.

    Returns:
        uint8, B C H W.
    """
    height, width = images.shape[-2:]
    # grid_sample expects positions between -1 and 1
    to_unit = torch.stack((maps[:, 0] * (2 / width), maps[:, 1] * (2 / height)), 1)
    along_x, along_y, shift = to_unit[..., None, None].unbind(2)
    x = torch.arange(0.5, width, device=images.device)
    y = torch.arange(0.5, height, device=images.device)[:, None]
    places_B2HW = along_x * x + (along_y * y + (shift - 1))
    # grid_sample pads with zeros, so the fill is subtracted before and added back after, with 0.5 for rounding.
    fill_C11 = torch.zeros(1, 1, 1, device=images.device) if fill is None else fill.view(-1, 1, 1)
    result = F.grid_sample(
        images.float().sub_(fill_C11),
        places_B2HW.permute(0, 2, 3, 1),
        mode=interpolation,
        padding_mode="border" if fill is None else "zeros",
        align_corners=False,
    ).add_(fill_C11 + 0.5)
    return to_uint8(result.clamp_(0, 255) if interpolation == "bicubic" else result)
