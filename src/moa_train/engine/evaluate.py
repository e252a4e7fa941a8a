"""Evaluation by exact counts: the same integers at any number of ranks, workers and threads."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moa_train.runtime import faults
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


class Batches(Protocol):
    """What is evaluated on: batches that can be counted beforehand."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


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
    batches: Batches,
    transform: Callable[[Any], Tensor],
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    distributed: Distributed,
    stop: Callable[[], bool] = lambda: False,
    advance: Callable[[int, int], None] = lambda done, rounds: None,
) -> Evaluation | None:
    """Count top-1 and top-5 hits of ``model`` over this rank's ``batches``, and add up over the ranks.

    Args:
        model: any module from images (B, C, H, W) to logits (B, K); put into eval mode, and back into its mode after.
        batches: this rank's share, with ``.labels`` and ``.to(device)``; every sample is in one rank's share.
        transform: from a batch on the device to normalised images.
        autocast: context of the forward pass.
        distributed: the ranks, and the device.
        stop: whether this rank has been asked to stop; then all ranks give up together and the result is None.
        advance: told after each batch how many of how many are done.
    """
    device = distributed.device
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    rounds = max(distributed.gather_objects(len(batches)))
    iterator = iter(batches)
    was_training = model.training
    model.eval()
    try:
        for done in range(1, rounds + 1):
            if distributed.agree_any(stop()):
                return None
            batch = next(iterator, None)
            if batch is not None:
                faults.point("evaluate.batch")
                _count(model, batch.to(device, non_blocking=True), transform, autocast, counts, loss)
            advance(done, rounds)
    finally:
        model.train(was_training)
    top1, top5, total = distributed.all_reduce_sum(counts).tolist()
    return Evaluation(top1, top5, total, distributed.all_reduce_sum(loss).item() / max(total, 1))


@torch.inference_mode()
def _count(
    model: nn.Module,
    batch: Any,
    transform: Callable[[Any], Tensor],
    autocast: Callable[[], AbstractContextManager[object]],
    counts: Tensor,
    loss: Tensor,
) -> None:
    with autocast():
        logits_BK = model(transform(batch))
    logits_BK = logits_BK.float()
    rank_B = rank_of_label(logits_BK, batch.labels)
    counts += torch.stack([(rank_B < 1).sum(), (rank_B < 5).sum(), torch.ones_like(rank_B).sum()])
    loss += torch.nn.functional.cross_entropy(logits_BK, batch.labels, reduction="sum").double()
