"""One micro-batch on its way from the loader to the model."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one size with the names of their samples.

    ``index``, ``epoch`` and ``repeat`` stay on the host wherever the images go: augmentation hashes them into
    decisions, and a decision taken on the device would make the host wait for it.

    Attributes:
        images: uint8, B C H W.
        labels: int64, B.
        index: int64, B; element of the data set.
        epoch: int64, B; pass over the data set.
        repeat: int64, B; copy of the sample within its pass.
        step: optimizer step; in evaluation the number of the chunk.
        micro: number of the micro-batch within the global batch; 0 in evaluation.
        unreadable: messages for files that could not be read and were replaced.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    epoch: Tensor
    repeat: Tensor
    step: int
    micro: int = 0
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with images and labels on ``device``."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """Return the batch with images and labels in page-locked memory, from where copies overlap with work."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())
