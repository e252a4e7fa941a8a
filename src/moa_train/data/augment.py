"""Stage 2: augmentation of whole batches, on the training device."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moa_train.data import photometric
from moa_train.data.batch import Batch, images_at_once, send
from moa_train.data.box import box_numbers, check_ranges, random_box
from moa_train.data.counter import Hashes, Purpose, sample_keys, uniform
from moa_train.data.erasing import RandomErasing
from moa_train.data.geometry import PADDING_MODES, pad_crop, warp
from moa_train.data.randaugment import RandAugment
from moa_train.runtime.errors import UserError, choose

CROPS = ("pad", "resized", "none")
STRONG = ("randaugment", "jitter")

Stage = Callable[[Tensor, Hashes], Tensor]
"""From uint8 images B C H W, whose samples have these keys, to others in memory of their own."""


class Normalize:
    """Turn uint8 images into floats of zero mean and unit deviation: (x / 255 - mean) / std, per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.shift = 255 * torch.tensor(mean).view(1, -1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(1, -1, 1, 1))

    def __call__(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalise uint8 B C H W to float32, into ``out`` if that is given."""
        self._move(images.device)
        out = torch.empty(images.shape, device=images.device) if out is None else out
        return out.copy_(images).sub_(self.shift).mul_(self.scale)

    def undo(self, images: Tensor) -> Tensor:
        """Turn normalised images back into uint8, for people to look at."""
        self._move(images.device)
        return images.float().div(self.scale).add_(self.shift).round_().clamp_(0, 255).to(torch.uint8)

    def _move(self, device: torch.device) -> None:
        self.shift = self.shift.to(device, non_blocking=True)
        self.scale = self.scale.to(device, non_blocking=True)


class BatchAugment:
    """Crop, flip, RandAugment, colour jitter, normalisation, random erasing, in this order.

    What happens to an image follows from (seed, epoch, index, repeat) alone. It is decided on the host, for a whole
    batch at once, and carried out on the device of the images; the host never waits for that device.

    Attributes:
        stages: what happens to uint8 images, by name, in order. Normalisation and erasing follow.

    Args:
        seed: of the run.
        mean: of each channel, of values in 0..1.
        std: deviation of each channel.
        crop: ``pad``: a random crop of the padded image; ``resized``: a random rectangle, resized; ``none``.
        padding: pixels a side for ``pad``.
        padding_mode: ``zero`` or ``reflect``.
        scale: range of the rectangle's area for ``resized``.
        ratio: range of its width / height.
        flip: probability of a horizontal flip.
        randaugment_ops: operations an image; 0 is off. Recipes: 2.
        randaugment_magnitude: their strength, 0 to 10.
        randaugment_std: deviation of the strength.
        color_jitter: brightness, contrast and saturation are changed by factors in 1 - jitter .. 1 + jitter.
        erasing: probability of random erasing. Recipes: 0.25.
    """

    def __init__(
        self,
        *,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop: str = "pad",
        padding: int = 4,
        padding_mode: str = "zero",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        randaugment_ops: int = 0,
        randaugment_magnitude: float = 9.0,
        randaugment_std: float = 0.5,
        color_jitter: float = 0.0,
        erasing: float = 0.0,
    ) -> None:
        if crop not in CROPS:
            raise UserError(choose("crop", crop, CROPS))
        if padding_mode not in PADDING_MODES:
            raise UserError(choose("padding_mode", padding_mode, PADDING_MODES))
        if padding < 0:
            raise UserError(f"padding={padding}: must be at least 0. Usual: 4.")
        check_ranges(scale, ratio)
        for what, value in (("flip", flip), ("color_jitter", color_jitter), ("erasing", erasing)):
            if not 0 <= value <= 1:
                raise UserError(f"{what}={value}: must lie between 0 and 1.")
        self.seed, self.flip, self.color_jitter = seed, flip, color_jitter
        self.padding, self.padding_mode, self.scale, self.ratio = padding, padding_mode, scale, ratio
        self.normalize = Normalize(mean, std)
        fill = (255 * torch.tensor(mean)).round()
        randaugment = RandAugment(randaugment_ops, randaugment_magnitude, randaugment_std, fill)
        self.erase = RandomErasing(erasing)
        stages: dict[str, tuple[object, Stage]] = {
            "crop": (crop != "none", self._pad_crop if crop == "pad" else self._resized_crop),
            "flip": (flip, self._flip),
            "randaugment": (randaugment_ops, randaugment),
            "jitter": (color_jitter, self._jitter),
        }
        self.stages = {name: stage for name, (on, stage) in stages.items() if on}

    def __call__(self, batch: Batch, strong: bool = True) -> Tensor:
        """Augment the images of a batch.

        Args:
            batch: uint8 images, B C H W.
            strong: False leaves out RandAugment, colour jitter and erasing, as in the last epochs of some recipes.

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
                for name, stage in self.stages.items():
                    if strong or name not in STRONG:
                        images = stage(images, keys[part])
                self.normalize(images, result[part])
                if strong:
                    self.erase(result[part], keys[part])
        return result

    def _pad_crop(self, images: Tensor, keys: Hashes) -> Tensor:
        corners = uniform(keys[:, None], Purpose.CROP, np.arange(2)) * (2 * self.padding + 1)
        top, left = send(corners.T.astype(np.int64), images)
        return pad_crop(images, self.padding, self.padding_mode, top, left)

    def _resized_crop(self, images: Tensor, keys: Hashes) -> Tensor:
        height, width = images.shape[-2:]
        numbers = box_numbers(keys, Purpose.CROP)
        boxes = [random_box((height, width), self.scale, self.ratio, sample) for sample in numbers]
        maps = [[[box.width / width, 0, box.left], [0, box.height / height, box.top]] for box in boxes]
        return warp(images, send(np.array(maps, np.float32), images), interpolation="bicubic")

    def _flip(self, images: Tensor, keys: Hashes) -> Tensor:
        flips = uniform(keys, Purpose.FLIP) < self.flip
        order = np.argsort(flips, kind="stable")  # flips last: copying slices is much faster than indexing
        images = images.index_select(0, send(order, images))
        flipped = images[len(flips) - flips.sum() :]
        flipped.copy_(flipped.flip(3))
        return images.index_select(0, send(np.argsort(order), images))

    def _jitter(self, images: Tensor, keys: Hashes) -> Tensor:
        factors = 1 + self.color_jitter * (2 * uniform(keys[:, None], Purpose.JITTER, np.arange(3)) - 1)
        bright, strong, vivid = send(factors.T.astype(np.float32), images).view(3, -1, 1, 1, 1)
        images = photometric.brightness(images, bright)
        images = photometric.contrast(images, strong)
        return photometric.colour(images, vivid)
