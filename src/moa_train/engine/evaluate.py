"""Evaluation by exact sums: the same counts for any number of ranks, workers and threads."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moa_train.interfaces import Batch, Batches, Metric
from moa_train.runtime import faults
from moa_train.runtime.distributed import Distributed


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        values: every metric by name.
        counts: the number of hits behind metrics that count, by name.
        total: number of samples.
    """

    values: dict[str, float]
    counts: dict[str, int]
    total: int

    def as_dict(self) -> dict[str, Any]:
        """Return values and counts as JSON."""
        counts = {f"{name}_count": count for name, count in self.counts.items()}
        return {**self.values, **counts, "total": self.total}


def evaluate(
    model: nn.Module,
    batches: Batches,
    transform: Callable[[Any], Tensor],
    *,
    metrics: Mapping[str, Metric],
    autocast: Callable[[], AbstractContextManager[object]],
    distributed: Distributed,
    stop: Callable[[], bool] = lambda: False,
    advance: Callable[[int, int], None] = lambda done, rounds: None,
) -> Evaluation | None:
    """Compute metrics of ``model`` over this rank's ``batches``, summed over all ranks.

    Args:
        model: any module from images (B, C, H, W) to logits (B, K). It runs in eval mode and gets its mode back.
        batches: this rank's share; every sample is in the share of exactly one rank.
        transform: from a batch on the device to normalized images.
        metrics: by name.
        autocast: context of the forward pass.
        distributed: the ranks, and the device.
        stop: whether this rank was asked to stop; all ranks then give up together and the result is None.
        advance: called after each batch with the number of batches done and their total number.
    """
    device = distributed.device
    sums: dict[str, Tensor] = {}
    samples = torch.zeros(1, dtype=torch.int64, device=device)
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
                _count(model, batch.to(device, non_blocking=True), transform, metrics, autocast, sums)
                samples += len(batch.labels)
            advance(done, rounds)
    finally:
        model.train(was_training)
    total = int(distributed.all_reduce_sum(samples))
    known = {name: (list(value.shape), value.is_floating_point()) for name, value in sums.items()}
    for name, (shape, real) in next((found for found in distributed.gather_objects(known) if found), {}).items():
        if name not in sums:  # a rank without a batch of its own contributes zeros
            sums[name] = torch.zeros(shape, dtype=torch.float64 if real else torch.int64, device=device)
    totals = {name: distributed.all_reduce_sum(sums[name]).cpu() for name in metrics if name in sums}
    counts = {name: int(value) for name, value in totals.items() if value.dtype == torch.int64 and value.dim() == 0}
    values = {name: metrics[name].value(value, total) for name, value in totals.items()}
    return Evaluation(values, counts, total)


@torch.inference_mode()
def _count(
    model: nn.Module,
    batch: Batch,
    transform: Callable[[Any], Tensor],
    metrics: Mapping[str, Metric],
    autocast: Callable[[], AbstractContextManager[object]],
    sums: dict[str, Tensor],
) -> None:
    with autocast():
        logits_BK = model(transform(batch))
    logits_BK = logits_BK.float()
    for name, metric in metrics.items():
        counted = metric.count(logits_BK, batch.labels)
        sums[name] = sums[name] + counted if name in sums else counted
