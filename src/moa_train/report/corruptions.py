"""Corruptions of images at five severities, computed from the images of any split.

The kinds and severities follow ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich, arXiv 1903.12261): images with a
side of up to 64 pixels use the severities of the latter. The implementation is another one, so the numbers compare
models that were measured here, but not with published numbers.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from moa_train.data.counter import hashes
from moa_train.data.image import EncodedImage

_SMALL = 64
"""Largest side of images that use the severities for small images."""

SEVERITIES = range(1, 6)


def gaussian_noise(image_CHW: Tensor, amount: float, key: int) -> Tensor:
    """Add normal noise with this standard deviation, in units of the range of the pixels."""
    noise = torch.randn(image_CHW.shape, generator=torch.Generator().manual_seed(key))
    return image_CHW + 255 * amount * noise


def gaussian_blur(image_CHW: Tensor, amount: float, key: int) -> Tensor:
    """Blur with a standard deviation of this many pixels."""
    radius = max(1, round(4 * amount))
    line = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * amount**2))
    line = line / line.sum()
    radius_y, radius_x = (min(radius, side - 1) for side in image_CHW.shape[1:])
    padded = F.pad(image_CHW[:, None], (radius_x, radius_x, radius_y, radius_y), mode="reflect")
    across = F.conv2d(padded, line[radius - radius_x : radius + radius_x + 1].view(1, 1, 1, -1))
    return F.conv2d(across, line[radius - radius_y : radius + radius_y + 1].view(1, 1, -1, 1))[:, 0]


def contrast(image_CHW: Tensor, amount: float, key: int) -> Tensor:
    """Reduce the differences from the mean color to this factor."""
    mean = image_CHW.mean((1, 2), keepdim=True)
    return mean + amount * (image_CHW - mean)


def pixelate(image_CHW: Tensor, amount: float, key: int) -> Tensor:
    """Reduce the resolution to this factor."""
    height, width = image_CHW.shape[1:]
    small = _image(image_CHW).resize((max(1, int(width * amount)), max(1, int(height * amount))), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small.resize((width, height), Image.Resampling.BOX))).permute(2, 0, 1).float()


def jpeg(image_CHW: Tensor, amount: float, key: int) -> Tensor:
    """Compress as JPEG of this quality."""
    file = io.BytesIO()
    _image(image_CHW).save(file, "JPEG", quality=int(amount))
    return EncodedImage(file.getvalue()).decode().float()


def _image(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


Corruption = Callable[[Tensor, float, int], Tensor]

CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
"""Functions with their amounts at the five severities, for small images and for others."""


def corrupt(images_BCHW: Tensor, index_B: NDArray[np.int64], name: str, severity: int) -> Tensor:
    """Corrupt a batch, each image independently of the others.

    Args:
        images_BCHW: uint8.
        index_B: positions of the images in their split, the keys of the noise.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
    """
    function, small, large = CORRUPTIONS[name]
    amount = (small if max(images_BCHW.shape[2:]) <= _SMALL else large)[severity - 1]
    keys = hashes(severity, index_B) >> np.uint64(1)
    changed = [function(image.float(), amount, int(key)) for image, key in zip(images_BCHW.cpu(), keys, strict=True)]
    return torch.stack(changed).round().clamp(0, 255).to(torch.uint8).to(images_BCHW.device)
