"""Augmentation of whole batches on the training device."""

import torch
from torch import Tensor

from moa_train.data.batch import Batch
from moa_train.data.counter import Floats, uniform


class Normalize:
    """Turn uint8 images into floats of zero mean and unit deviation: (x / 255 - mean) / std per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.shift = 255 * torch.tensor(mean).view(1, -1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(1, -1, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise uint8 B C H W to float32."""
        self.shift, self.scale = self.shift.to(images.device), self.scale.to(images.device)
        return images.float().sub_(self.shift).mul_(self.scale)


class BatchAugment:
    """Random crop, flip and normalisation of a batch; each image's draws depend on its own key alone."""

    def __init__(
        self,
        *,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop: str = "pad",
        padding: int = 4,
        flip: float = 0.5,
    ) -> None:
        self.seed, self.crop, self.padding, self.flip = seed, crop, padding, flip
        self.normalize = Normalize(mean, std)

    def __call__(self, batch: Batch, strong: bool = True) -> Tensor:
        """Augment the images of a batch: float32, B C H W."""
        images = batch.images
        if self.crop == "pad":
            images = pad_crop(images, self.padding, self.draw(batch, 0), self.draw(batch, 1))
        flipped = torch.from_numpy(self.draw(batch, 2) < self.flip).to(images.device, non_blocking=True)
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
        return self.normalize(images)

    def draw(self, batch: Batch, purpose: int) -> Floats:
        """Return one uniform number per image."""
        return uniform(self.seed, batch.epoch.numpy(), batch.index.numpy(), batch.repeat.numpy(), purpose)


def pad_crop(images: Tensor, padding: int, top: Floats, left: Floats) -> Tensor:
    """Crop zero-padded images back to their size."""
    _, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    y, x = (torch.from_numpy((u * (2 * padding + 1)).astype(int)).to(images.device) for u in (top, left))
    return windows[torch.arange(len(images), device=images.device), :, y, x]
