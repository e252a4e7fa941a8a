"""Evaluation by exact counts: the same integers at any number of ranks, workers and threads."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moa_train.runtime.distributed import Distributed


@dataclass(frozen=True)
class Evaluation:
    """Counts over one split. ``loss`` is the mean cross-entropy in nats."""

    top1_count: int
    top5_count: int
    total: int
    loss: float

    @property
    def top1(self) -> float:
        """Share of samples whose label has the largest logit, in percent."""
        return 100 * self.top1_count / max(self.total, 1)

    @property
    def top5(self) -> float:
        """Share of samples whose label is among the five largest logits, in percent."""
        return 100 * self.top5_count / max(self.total, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return counts and percentages as JSON."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "top1_count": self.top1_count,
            "top5_count": self.top5_count,
            "total": self.total,
        }


def rank_of_label(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return how many classes come before each sample's label: 0 is a top-1 hit. Shape (B,), int64.

    Ties go to the lower class index, on every device; a NaN at the label, or anywhere before it, never counts as a hit.
    """
    label_B1 = labels_B[:, None]
    logit_B1 = logits_BK.gather(1, label_B1)
    classes_K = torch.arange(logits_BK.shape[1], device=logits_BK.device)
    ahead_BK = ~(logits_BK <= logit_B1) | ((logits_BK == logit_B1) & (classes_K < label_B1))
    return ahead_BK.sum(dim=1)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    transform: Callable[[Any], Tensor],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    distributed: Distributed,
) -> Evaluation:
    """Count top-1 and top-5 hits of ``model`` over this rank's ``batches``, and add up over the ranks.

    Args:
        model: any module from images (B, C, H, W) to logits (B, K); put into eval mode, and back into its mode after.
        batches: this rank's share, with ``.labels`` and ``.to(device)``. Every sample must be in exactly one rank's share.
        transform: from a batch on the device to normalised images.
        device: where to evaluate.
        autocast: context of the forward pass.
        distributed: the ranks.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                batch = batch.to(device, non_blocking=True)
                with autocast():
                    logits_BK = model(transform(batch))
                logits_BK = logits_BK.float()
                rank_B = rank_of_label(logits_BK, batch.labels)
                counts += torch.stack(
                    [(rank_B < 1).sum(), (rank_B < 5).sum(), torch.tensor(len(rank_B), device=device)]
                )
                loss += torch.nn.functional.cross_entropy(logits_BK, batch.labels, reduction="sum").double()
    finally:
        model.train(was_training)
    top1, top5, total = distributed.all_reduce_sum(counts).tolist()
    return Evaluation(top1, top5, total, distributed.all_reduce_sum(loss).item() / max(total, 1))
