"""Mixup and cutmix over a micro-batch, with soft targets."""

import math

import numpy as np
import torch
from torch import Tensor

from moa_train.data.batch import images_at_once
from moa_train.schema import AugmentConfig


class Mixer:
    """Blend each image of a micro-batch, and its target, with the one at the mirrored position in the micro-batch.

    One mixing proportion applies to the whole micro-batch. The host draws it with the key of the micro-batch as the
    seed, so it is the same for any number of ranks and on any device.

    Args:
        config: alphas of the Beta distributions of mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019),
            probabilities, and label smoothing.
        num_classes: number of classes, K.
    """

    def __init__(self, config: AugmentConfig, num_classes: int) -> None:
        self.config, self.num_classes = config, num_classes

    def __call__(
        self, images: Tensor, targets: Tensor, key: tuple[int, int, int], strong: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Mix a micro-batch.

        Args:
            images: float, (B, C, H, W); mixed in place.
            targets: float32, (B, K); mixed in place.
            key: (seed, step, number of the micro-batch).
            strong: whether to mix.

        Returns:
            The images and targets.
        """
        config = self.config
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        mixes, switch = rng.random(2)
        if not strong or not (config.mixup or config.cutmix) or mixes >= config.mix_prob:
            return images, targets
        if config.cutmix and (not config.mixup or switch < config.mix_switch_prob):
            height, width = images.shape[-2:]
            box, kept = cutmix_box(height, width, float(rng.beta(config.cutmix, config.cutmix)), rng)
            blend(images[..., *box], 1.0)
        else:
            kept = float(rng.beta(config.mixup, config.mixup))
            blend(images, 1 - kept)
        blend(targets, 1 - kept)
        return images, targets

    def smooth(self, labels: Tensor) -> Tensor:
        """Return one-hot targets, float32, (B, K), with ``label_smoothing`` spread evenly over all classes."""
        smoothing = self.config.label_smoothing
        rest = smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), rest, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1 - smoothing + rest)


def cutmix_box(height: int, width: int, kept: float, rng: np.random.Generator) -> tuple[tuple[slice, slice], float]:
    """Return the rows and columns to paste, and the fraction of the area that is actually kept.

    The box covers 1 - kept of the area. It is clipped at the borders of the image, so it may cover less.
    """
    side = math.sqrt(1 - kept)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(y - half_y, 0), min(y + half_y, height)
    left, right = max(x - half_x, 0), min(x + half_x, width)
    return (slice(top, bottom), slice(left, right)), 1 - (bottom - top) * (right - left) / (height * width)


def blend(rows: Tensor, weight: float) -> None:
    """Interpolate each row of a batch toward the row at the mirrored position by ``weight``, in place."""
    half, at_once = len(rows) // 2, images_at_once(rows)  # with an odd number of rows, the middle one stays
    for start in range(0, half, at_once):
        end = min(start + at_once, half)
        first, last = rows[start:end], rows[len(rows) - end : len(rows) - start]
        opposite = last.flip(0)
        last.lerp_(first.flip(0), weight)
        first.lerp_(opposite, weight)
