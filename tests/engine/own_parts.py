"""A metric and losses as users write them, named by import path in the tests."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RecallArgs:
    """Settings of the metric."""

    classes: int


class Recall:
    """Balanced accuracy: the mean over the classes of the percentage of samples that are recognized."""

    higher_is_better = True

    def __init__(self, args: RecallArgs) -> None:
        self.classes = args.classes

    def count(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        """Return hits and samples of each class, int64, (2, classes)."""
        hits_B = logits_BK.argmax(1) == labels_B
        return torch.stack(
            [labels_B[hits_B].bincount(minlength=self.classes), labels_B.bincount(minlength=self.classes)]
        )

    def value(self, totals: Tensor, samples: int) -> float:
        """Return the mean percentage over the classes that occur."""
        hits_K, samples_K = totals
        return 100 * (hits_K / samples_K)[samples_K > 0].mean(dtype=torch.float64).item()


@dataclass
class FocalArgs:
    """Settings of the loss."""

    gamma: float = 2.0


def focal(logits_BK: Tensor, targets_BK: Tensor, args: FocalArgs) -> Tensor:
    """Return the focal loss (Lin et al. 2017), summed over the batch."""
    logs_BK = logits_BK.log_softmax(dim=-1)
    return -(targets_BK * (1 - logs_BK.exp()) ** args.gamma * logs_BK).sum()
