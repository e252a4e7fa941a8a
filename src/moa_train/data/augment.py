"""Augmentation of whole batches, on the training device (files were cropped and resized by `view` before)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moa_train.data import photometric
from moa_train.data.affine import pad_crop, warp
from moa_train.data.batch import Batch, images_at_once, send
from moa_train.data.box import box_numbers, random_box
from moa_train.data.counter import Hashes, Purpose, sample_keys, uniform
from moa_train.data.erasing import RandomErasing
from moa_train.data.randaugment import RandAugment
from moa_train.data.source import Source
from moa_train.data.view import CentreCrop, RandomResizedCrop, View
from moa_train.plugins import AUGMENTATIONS, DATASETS, short_name
from moa_train.schema import AugmentConfig, DataConfig

STRONG = ("randaugment", "jitter", "extra")
"""Operations that ``augment.weak_for`` switches off, in addition to erasing and mixing."""

ImageOp = Callable[[Tensor, Hashes], Tensor]
"""From uint8 images B C H W, whose samples have these keys, to new ones in memory of their own."""


def plan_crop(config: AugmentConfig, source: Source) -> tuple[View, str]:
    """Decide where the random crop happens: return the view of files, and the crop that `BatchAugment` applies.

    A random resized crop of a file is cut out while it is read, at the file's own resolution. All other crops act on
    whole batches of images that have their final size.
    """
    if config.crop == "resized" and not source.in_memory:
        scale, ratio = (config.scale[0], config.scale[1]), (config.ratio[0], config.ratio[1])
        return RandomResizedCrop(source.image_size, scale, ratio, config.interpolation), "none"
    return CentreCrop(source.image_size, 1.0), config.crop


class Normalize:
    """Turn uint8 images into floats of zero mean and unit deviation: (x / 255 - mean) / std, per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.shift = 255 * torch.tensor(mean).view(1, -1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(1, -1, 1, 1))
        self.fill = (255 * torch.tensor(mean)).round()

    @classmethod
    def of(cls, config: DataConfig) -> "Normalize":
        """Return the normalization with the given statistics, or those of the data set."""
        known = DATASETS.load(config.name)
        return cls(config.mean or known.mean, config.std or known.std)

    def __call__(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalize uint8 B C H W to float32, into ``out`` if that is given."""
        self._move(images.device)
        out = torch.empty(images.shape, device=images.device) if out is None else out
        return out.copy_(images).sub_(self.shift).mul_(self.scale)

    def undo(self, images: Tensor) -> Tensor:
        """Turn normalized images back into uint8, to be looked at."""
        self._move(images.device)
        return images.float().div(self.scale).add_(self.shift).round_().clamp_(0, 255).to(torch.uint8)

    def _move(self, device: torch.device) -> None:
        self.shift = self.shift.to(device, non_blocking=True)
        self.scale = self.scale.to(device, non_blocking=True)


class BatchAugment:
    """Crop, flip, RandAugment, color jitter, a user's own operations, normalization, random erasing, in this order.

    What happens to an image follows from (seed, epoch, index, repeat) alone. It is decided on the host, for a whole
    batch at once, and carried out on the device of the images; the host never waits for that device.

    Attributes:
        ops: the operations on uint8 images, by name, in order. Normalization and erasing follow.

    Args:
        config: what to apply, and how strongly.
        crop: the crop to apply here, as `plan_crop` decides.
        seed: of the run.
        normalize: normalization; its mean also fills pixels that come from outside an image.
    """

    def __init__(self, config: AugmentConfig, *, crop: str, seed: int, normalize: "Normalize") -> None:
        self.config, self.seed, self.normalize = config, seed, normalize
        self.erase = RandomErasing(config.erasing)
        ops: list[tuple[str, object, ImageOp]] = [
            ("crop", crop == "pad", self._pad_crop),
            ("crop", crop == "resized", self._resized_crop),
            ("flip", config.flip, self._flip),
            ("randaugment", config.randaugment_ops, RandAugment(config, normalize.fill)),
            ("jitter", config.color_jitter, self._jitter),
            ("extra", config.extra, self._extra),
        ]
        self.ops = {name: op for name, enabled, op in ops if enabled}
        self._own = [
            (AUGMENTATIONS.load(name), AUGMENTATIONS.args(name, config.args.get(short_name(name), {}), "augment.args"))
            for name in config.extra
        ]

    def __call__(self, batch: Batch, strong: bool = True) -> Tensor:
        """Augment the images of a batch.

        Args:
            batch: uint8 images, B C H W.
            strong: False leaves out the operations named in `STRONG`, and erasing.

        Returns:
            float32, B C H W.
        """
        keys = sample_keys(self.seed, batch.epoch.numpy(), batch.index.numpy(), batch.repeat.numpy())
        result = torch.empty(batch.images.shape, device=batch.images.device)
        at_once = images_at_once(batch.images)
        with torch.inference_mode():  # hundreds of small operations, each a little cheaper like that
            for start in range(0, len(batch), at_once):
                part = slice(start, start + at_once)
                images = batch.images[part]
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
        return warp(images, send(np.array(maps, np.float32), images), interpolation="bicubic")

    def _flip(self, images: Tensor, keys: Hashes) -> Tensor:
        flips = uniform(keys, Purpose.FLIP) < self.config.flip
        order = np.argsort(flips, kind="stable")  # flips last: copying slices is much faster than indexing
        images = images.index_select(0, send(order, images))
        flipped = images[len(flips) - flips.sum() :]
        flipped.copy_(flipped.flip(3))
        return images.index_select(0, send(np.argsort(order), images))

    def _jitter(self, images: Tensor, keys: Hashes) -> Tensor:
        factors = 1 + self.config.color_jitter * (2 * uniform(keys[:, None], Purpose.JITTER, np.arange(3)) - 1)
        bright, strong, vivid = send(factors.T.astype(np.float32), images).view(3, -1, 1, 1, 1)
        images = photometric.brightness(images, bright)
        images = photometric.contrast(images, strong)
        return photometric.colour(images, vivid)

    def _extra(self, images: Tensor, keys: Hashes) -> Tensor:
        for op, args in self._own:
            images = op(images, keys, **args)
        return images
