"""Augmentation of whole batches on the training device (`view` has already cropped and resized images from files).

Your own augmentation is a function. Name it by import path, ``augment.extra=[my_package.color:to_gray]``::

    from dataclasses import dataclass

    import torch
    from torch import Tensor

    from moa_train.data.batch import send
    from moa_train.data.counter import Hashes, uniform
    from moa_train.knobs import knob

    @dataclass
    class ToGray:
        probability: float = knob(0.2, "probability of a gray image", least=0, most=1)

    def to_gray(images: Tensor, keys: Hashes, args: ToGray) -> Tensor:
        chosen = send(uniform(keys, 0) < args.probability, images)
        gray = images.float().mean(1, keepdim=True).to(torch.uint8)
        return torch.where(chosen.view(-1, 1, 1, 1), gray, images)

It receives uint8 images (B, 3, H, W) on the training device, a key for each image, and its settings
(``augment.args.to_gray.probability=0.5``) if it has a parameter ``args``. It returns uint8 images of the same shape.

- Random numbers come from the keys; `counter` explains how. `send` copies them to the device without waiting for it.
- The result for an image depends only on this image and its key, because a batch is augmented in parts.
- It must not modify the images that it receives, but return new ones.
- ``augment.weak_for`` disables it, like all strong augmentation.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_train.data import photometric
from moa_train.data.affine import pad_crop, warp
from moa_train.data.batch import images_at_once, send
from moa_train.data.box import box_numbers, random_box
from moa_train.data.counter import Hashes, Purpose, own_keys, sample_keys, uniform
from moa_train.data.erasing import RandomErasing
from moa_train.data.randaugment import RandAugment
from moa_train.data.source import Source
from moa_train.data.view import CenterCrop, RandomResizedCrop, View
from moa_train.interfaces import Batch
from moa_train.plugins import AUGMENTATIONS, DATASETS, short_name
from moa_train.runtime.device import to_device
from moa_train.runtime.errors import UserError
from moa_train.schema import AugmentConfig, DataConfig

STRONG = ("randaugment", "jitter", "extra")
"""Operations that ``augment.weak_for`` disables, in addition to erasing and mixing."""

ImageOp = Callable[[Tensor, Hashes], Tensor]
"""A function from uint8 images (B, C, H, W) and the keys of their samples to new images, not in the same memory."""


def plan_crop(config: AugmentConfig, source: Source) -> tuple[View, str]:
    """Return the view for image files and the crop that `BatchAugment` applies, so that images are cropped only once.

    The random resized crop of a file is taken while the file is read, at its own resolution. All other crops act on
    whole batches of images that already have their final size.
    """
    if config.crop == "resized" and not source.in_memory:
        scale, ratio = (config.scale[0], config.scale[1]), (config.ratio[0], config.ratio[1])
        return RandomResizedCrop(source.image_size, scale, ratio, config.interpolation), "none"
    return CenterCrop(source.image_size, 1.0, config.interpolation), config.crop


class Normalize:
    """Normalize uint8 images to floats of zero mean and unit variance: (x / 255 - mean) / std, per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.shift = 255 * torch.tensor(mean).view(1, -1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(1, -1, 1, 1))
        self.fill = (255 * torch.tensor(mean)).round()

    @classmethod
    def of(cls, config: DataConfig) -> "Normalize":
        """Return the normalization with the configured statistics, by default those of the data set."""
        return cls(*cls.statistics(config))

    @staticmethod
    def statistics(config: DataConfig) -> tuple[Sequence[float], Sequence[float]]:
        """Return the means and standard deviations of the channels."""
        if config.mean and config.std:
            return config.mean, config.std  # a data set of the user's own may not be installed where its weights are
        known = DATASETS.load(config.name)
        return config.mean or known.mean, config.std or known.std

    def __call__(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """Return uint8 images (B, C, H, W) as normalized float32, written into ``out`` if it is given."""
        self._move(images.device)
        out = torch.empty(images.shape, device=images.device) if out is None else out
        return out.copy_(images).sub_(self.shift).mul_(self.scale)

    def undo(self, images: Tensor) -> Tensor:
        """Return normalized images as uint8 again, to display them."""
        self._move(images.device)
        return images.float().div(self.scale).add_(self.shift).round_().clamp_(0, 255).to(torch.uint8)

    def _move(self, device: torch.device) -> None:
        self.shift, self.scale = to_device(self.shift, device), to_device(self.scale, device)


class BatchAugment:
    """Crop, flip, RandAugment, color jitter, a user's own operations, normalization, random erasing, in this order.

    The augmentation of an image depends only on (seed, epoch, index, repeat). The host draws the random numbers for a
    whole batch at once, and the operations run on the device of the images; the host never waits for this device.

    Attributes:
        ops: the operations on uint8 images, by name, in order. Normalization and erasing follow.

    Args:
        config: the operations and their strengths.
        crop: the crop to apply, as returned by `plan_crop`.
        seed: seed of the run.
        normalize: normalization; its mean is also the color of pixels from outside an image.
    """

    def __init__(self, config: AugmentConfig, *, crop: str, seed: int, normalize: "Normalize") -> None:
        self.config, self.seed, self.normalize = config, seed, normalize
        self.erase = RandomErasing(config.erasing)
        ops: list[tuple[str, object, ImageOp]] = [
            ("crop", crop == "pad", self._pad_crop),
            ("crop", crop == "resized", self._resized_crop),
            ("flip", config.flip and not config.alternating_flip, self._flip),
            ("randaugment", config.randaugment_ops, RandAugment(config, normalize.fill)),
            ("jitter", config.color_jitter, self._jitter),
            ("extra", config.extra, self._extra),
        ]
        self.ops = {name: op for name, enabled, op in ops if enabled}
        self._own = []
        for name in config.extra:
            short = short_name(name)
            args = AUGMENTATIONS.args(name, config.args.get(short, {}), f"augment.args.{short}")
            self._own.append((short, AUGMENTATIONS.load(name), args))

    def __call__(self, batch: Batch, strong: bool = True) -> Tensor:
        """Augment the images of a batch.

        Args:
            batch: uint8 images, (B, C, H, W).
            strong: False omits erasing and the operations named in `STRONG`.

        Returns:
            Normalized images, float32, (B, C, H, W).
        """
        keys = sample_keys(self.seed, batch.epoch.numpy(), batch.index.numpy(), batch.repeat.numpy())
        result = torch.empty(batch.images.shape, device=batch.images.device)
        at_once = images_at_once(batch.images)
        with torch.inference_mode():  # makes hundreds of small operations a little cheaper
            for start in range(0, len(batch), at_once):
                part = slice(start, start + at_once)
                images = batch.images[part]
                if self.config.alternating_flip:
                    images = mirror(images, self._alternate(batch)[part])
                for name, op in self.ops.items():
                    if strong or name not in STRONG:
                        images = op(images, keys[part])
                self.normalize(images, result[part])
                if strong:
                    self.erase(result[part], keys[part])
        return result

    def _pad_crop(self, images: Tensor, keys: Hashes) -> Tensor:
        padding = self.config.padding
        corners = uniform(keys[:, None], Purpose.CROP, np.arange(2)) * (2 * padding + 1)
        top, left = send(corners.T.astype(np.int64), images)
        return pad_crop(images, padding, top, left)

    def _resized_crop(self, images: Tensor, keys: Hashes) -> Tensor:
        height, width = images.shape[-2:]
        (low, high), (narrow, wide) = self.config.scale, self.config.ratio
        numbers = box_numbers(keys, Purpose.CROP)
        boxes = [random_box((height, width), (low, high), (narrow, wide), sample) for sample in numbers]
        maps = [[[box.width / width, 0, box.left], [0, box.height / height, box.top]] for box in boxes]
        return warp(images, send(np.array(maps, np.float32), images), interpolation=self.config.interpolation)

    def _flip(self, images: Tensor, keys: Hashes) -> Tensor:
        return mirror(images, uniform(keys, Purpose.FLIP) < self.config.flip)

    def _alternate(self, batch: Batch) -> NDArray[np.bool_]:
        """Return which images to mirror: half of them in the first epoch, the others in the next one, and so on."""
        first = uniform(sample_keys(self.seed, 0, batch.index.numpy(), 0), Purpose.FLIP) < 0.5
        return first ^ ((batch.epoch + batch.repeat).numpy() % 2 == 1)

    def _jitter(self, images: Tensor, keys: Hashes) -> Tensor:
        factors = 1 + self.config.color_jitter * (2 * uniform(keys[:, None], Purpose.JITTER, np.arange(3)) - 1)
        bright, strong, vivid = send(factors.T.astype(np.float32), images).view(3, -1, 1, 1, 1)
        images = photometric.brightness(images, bright)
        images = photometric.contrast(images, strong)
        return photometric.color(images, vivid)

    def _extra(self, images: Tensor, keys: Hashes) -> Tensor:
        for name, op, args in self._own:
            result = op(images, own_keys(keys, name), **args)
            if result.dtype != torch.uint8 or result.shape != images.shape:
                raise UserError(
                    f"augment.extra: {name} returned {result.dtype} of shape {tuple(result.shape)}. "
                    f"It must return torch.uint8 of shape {tuple(images.shape)}, as it was given."
                )
            images = result
        return images


def mirror(images: Tensor, flips: NDArray[np.bool_]) -> Tensor:
    """Return new images (B, C, H, W), in which those with True in ``flips`` (B) are flipped horizontally."""
    order = np.argsort(flips, kind="stable")  # flipped images last: copying a slice is much faster than indexing
    images = images.index_select(0, send(order, images))
    flipped = images[len(flips) - flips.sum() :]
    flipped.copy_(flipped.flip(3))
    return images.index_select(0, send(np.argsort(order), images))
