"""Thumbnails of images: sheets of many small images, because one JPEG of 256 is small and quick to encode."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from moa_train.assembly.pictures import read_images
from moa_train.data.resample import resample
from moa_train.data.source import Source

SIDE = 96
"""Largest side of a thumbnail, in pixels."""
COLUMNS = 16
"""Thumbnails in a row of a sheet."""
PER_SHEET = COLUMNS**2
PREFIX = "data:image/jpeg;base64,"


@dataclass(frozen=True)
class Sheets:
    """Thumbnails of images, as the model sees the images.

    Attributes:
        size: height and width of a thumbnail.
        files: each sheet as base64 of a JPEG.
        places: sheet and position in it, by image.
    """

    size: tuple[int, int]
    files: list[str]
    places: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, source: Source, rows: Sequence[int], crop_ratio: float, budget: int) -> "Sheets":
        """Create the sheets.

        Args:
            source: the images.
            rows: in order of importance, without repetitions.
            crop_ratio: see ``EvalLoader``.
            budget: characters; sheets that would exceed it are left out, except for the first one.
        """
        scale = min(1.0, SIDE / max(source.image_size))
        size = round(source.image_size[0] * scale), round(source.image_size[1] * scale)
        sheets = cls(size, [], {})
        for start in range(0, len(rows), PER_SHEET):
            chunk = rows[start : start + PER_SHEET]
            text = encode(tiled(resample(read_images(source, chunk, crop_ratio), size)))
            budget -= len(text)
            if budget < 0 and start:
                break
            sheets.places.update({row: (len(sheets.files), place) for place, row in enumerate(chunk)})
            sheets.files.append(text)
        return sheets


def tiled(images_BCHW: Tensor) -> Tensor:
    """Return a sheet of the images, (3, H', W'), row by row; the last row is filled up with black."""
    missing = -len(images_BCHW) % COLUMNS
    images = torch.cat([images_BCHW, images_BCHW.new_zeros(missing, *images_BCHW.shape[1:])])
    rows = images.unflatten(0, (-1, COLUMNS))  # R W' C H W
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def encode(pixels_CHW: Tensor) -> str:
    """Return an image as base64 of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=75)
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
