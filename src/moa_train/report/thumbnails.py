"""Thumbnails of images as data URIs."""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from moa_train.data.array_source import ArraySource
from moa_train.data.order import Draw
from moa_train.data.source import Source
from moa_train.data.view import CenterCrop

SIDE = 96
"""Height of a thumbnail, in pixels; its width is at most twice that."""
PREFIX = "data:image/webp;base64,"
_CHUNK = 64


def thumbnails(source: Source, rows: Sequence[int], crop_ratio: float, budget: int) -> dict[int, str]:
    """Return thumbnails of the given images as base64, by row, as the model sees the images.

    Args:
        source: the images.
        rows: in order of importance, without repetitions.
        crop_ratio: see ``EvalLoader``.
        budget: characters; images that would exceed it are left out.
    """
    found: dict[int, str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), _CHUNK):
            if budget <= 0:
                break
            chunk = rows[start : start + _CHUNK]
            for row, text in zip(
                chunk, pool.map(lambda row: encode(read(source, row, crop_ratio)), chunk), strict=True
            ):
                budget -= len(text)
                if budget > 0:
                    found[row] = text
    return found


def read(source: Source, row: int, crop_ratio: float) -> Tensor:
    """Return the pixels that the model receives, uint8, (3, H, W)."""
    index, zero = np.array([row]), np.zeros(1, np.int64)
    if isinstance(source, ArraySource):
        return source.gather(index)[0]
    view = CenterCrop(source.image_size, crop_ratio)
    return source.read(Draw(zero, index, zero), 0, view, substitute=False)[0][0]


def encode(pixels_CHW: Tensor) -> str:
    """Return an image as base64 of a small WebP file."""
    image = Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())
    image.thumbnail((2 * SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, method=0)
    return base64.b64encode(file.getvalue()).decode()


def overlay(pixels_CHW: Tensor, weight_HW: Tensor) -> Tensor:
    """Return the image dark where there is no positive weight, and orange where it is large: uint8, (3, H, W).

    Args:
        pixels_CHW: uint8.
        weight_HW: of any range; it is smoothed over an eighth of the image.
    """
    side = max(1, min(weight_HW.shape) // 16)
    weight = F.avg_pool2d(weight_HW.float().clamp_min(0)[None], 2 * side + 1, 1, side, count_include_pad=False)
    weight = weight / weight.max().clamp_min(1e-12)
    orange = torch.tensor([255.0, 120.0, 20.0])[:, None, None]
    image = pixels_CHW.float() * (0.4 + 0.6 * weight)
    return (image + 0.45 * weight * (orange - image)).clamp(0, 255).to(torch.uint8)
