"""Geometric operations on batches: crops, flips, and one affine map per image."""

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = {"zero": "constant", "reflect": "reflect"}


def pad_crop(images: Tensor, padding: int, mode: str, top: Tensor, left: Tensor) -> Tensor:
    """Pad images and crop them back to their size.

    Args:
        images: uint8, B C H W.
        padding: pixels on each side.
        mode: a key of ``PADDING_MODES``.
        top: int64, B in 0 .. 2 padding; first row of the crop in the padded image.
        left: int64, B; first column.
    """
    _, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4, mode=PADDING_MODES[mode])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: B C 2p+1 2p+1 H W
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def warp(images: Tensor, maps: Tensor, fill: Tensor | None = None, interpolation: str = "bilinear") -> Tensor:
    """Move the pixels of each image by an affine map.

    As Pillow's ``Image.transform``: the pixel at (x, y) of the result has its centre at (x + 1/2, y + 1/2) and shows
    what the image has at A (x + 1/2, y + 1/2, 1).

    Args:
        images: uint8, B C H W.
        maps: float32, B 2 3; from places in the result to places in the image, in pixels, x first.
        fill: C values for places outside the image; without, its nearest pixel.
        interpolation: bilinear or bicubic.

    Returns:
        uint8, B C H W.
    """
    batch, _, height, width = images.shape
    y, x = (torch.arange(side, device=images.device) + 0.5 for side in (height, width))
    centres = torch.stack((*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width, device=images.device)), -1)
    size = torch.tensor([width, height], device=images.device, dtype=torch.float32)
    places = (centres.view(1, -1, 3) @ maps.transpose(1, 2)).view(batch, height, width, 2)
    result = F.grid_sample(
        images.float(), places * (2 / size) - 1, mode=interpolation, padding_mode="border", align_corners=False
    )
    result = result.add_(0.5).clamp_(0, 255).to(torch.uint8)
    if fill is None:
        return result
    inside = ((places >= 0) & (places < size)).all(-1)
    return torch.where(inside[:, None], result, fill.to(torch.uint8).view(1, -1, 1, 1))
