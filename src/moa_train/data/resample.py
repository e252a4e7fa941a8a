"""Resizing of uint8 images."""

import torch.nn.functional as F
from torch import Tensor


def resample(x_BCHW: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize uint8 images with an antialiased filter."""
    return F.interpolate(x_BCHW, size, mode=mode, antialias=True)
