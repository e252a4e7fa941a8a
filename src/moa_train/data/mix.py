"""Mixup and cutmix over a micro-batch, with soft targets."""

import math

import numpy as np
import torch
from torch import Tensor

from moa_train.data.batch import images_at_once
from moa_train.runtime.errors import UserError


class Mixer:
    """Blend each image of a micro-batch with the one at the opposite place, and its target likewise.

    One proportion serves the whole micro-batch. It is drawn on the host by a generator of its own, from the key of
    the micro-batch: the same at any number of ranks and on any device.

    Args:
        mixup: alpha of the Beta distribution of mixup's proportion (Zhang et al. 2018); 0 is off.
        cutmix: alpha for cutmix (Yun et al. 2019); 0 is off.
        prob: probability that a micro-batch is mixed at all.
        switch_prob: probability of cutmix where both are on.
        smoothing: probability mass that targets spread over all classes.
        num_classes: K.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.1,
    ) -> None:
        for what, value in (("mixup", mixup), ("cutmix", cutmix)):
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{what}={value}: the alpha of a Beta distribution, 0 (off) or more.")
        for what, value in (("mix_prob", prob), ("mix_switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise UserError(f"{what}={value}: a probability lies between 0 and 1.")
        if not 0 <= smoothing < 1:
            raise UserError(f"label_smoothing={smoothing}: must be at least 0 and less than 1. Usual: 0.1.")
        self.mixup, self.cutmix, self.prob, self.switch_prob = mixup, cutmix, prob, switch_prob
        self.smoothing, self.num_classes = smoothing, num_classes

    def __call__(
        self, images: Tensor, labels: Tensor, key: tuple[int, int, int], strong: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Mix a micro-batch.

        Args:
            images: float, B C H W; mixed in place.
            labels: int64, B.
            key: (seed, step, number of the micro-batch).
            strong: False leaves the images alone; smoothing stays.

        Returns:
            Images, and targets as float32 B K whose rows sum to 1.
        """
        targets = self.smooth(labels)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        mixes, switch = rng.random(2)
        if not strong or not (self.mixup or self.cutmix) or mixes >= self.prob:
            return images, targets
        if self.cutmix and (not self.mixup or switch < self.switch_prob):
            height, width = images.shape[-2:]
            box, kept = cutmix_box(height, width, float(rng.beta(self.cutmix, self.cutmix)), rng)
            blend(images[..., *box], 1.0)
        else:
            kept = float(rng.beta(self.mixup, self.mixup))
            blend(images, 1 - kept)
        blend(targets, 1 - kept)
        return images, targets

    def smooth(self, labels: Tensor) -> Tensor:
        """Return one-hot targets, float32 B K, with ``smoothing`` spread evenly over all classes."""
        rest = self.smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), rest, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1 - self.smoothing + rest)


def cutmix_box(height: int, width: int, kept: float, rng: np.random.Generator) -> tuple[tuple[slice, slice], float]:
    """Choose rows and columns to paste: (box, part of the area that really stays).

    The box would cover 1 - kept of the area; where it leaves the image it is cut, so less may be covered.
    """
    side = math.sqrt(1 - kept)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(y - half_y, 0), min(y + half_y, height)
    left, right = max(x - half_x, 0), min(x + half_x, width)
    return (slice(top, bottom), slice(left, right)), 1 - (bottom - top) * (right - left) / (height * width)


def blend(rows: Tensor, weight: float) -> None:
    """Move each row of a batch by ``weight`` of the way to the one at the opposite place, in place."""
    half, at_once = len(rows) // 2, images_at_once(rows)  # an odd one in the middle is its own opposite
    for start in range(0, half, at_once):
        end = min(start + at_once, half)
        first, last = rows[start:end], rows[len(rows) - end : len(rows) - start]
        opposite = last.flip(0)
        last.lerp_(first.flip(0), weight)
        first.lerp_(opposite, weight)
