"""Evaluation by sums over all samples, which are the same for any number of ranks, workers and threads."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moa_train.interfaces import Batch, Batches, Metric
from moa_train.runtime import faults
from moa_train.runtime.device import copies_overlap
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopRequestedError


class FailedEvaluationError(UserError):
    """Report, on every rank, that a rank could not read its images."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        values: every metric by name.
        counts: the number of hits behind each metric whose sum is one whole number, by name.
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
    transform: Callable[[Batch], Tensor],
    *,
    metrics: Mapping[str, Metric],
    autocast: Callable[[], AbstractContextManager[object]],
    distributed: Distributed,
    stop: Callable[[], bool] = lambda: False,
    advance: Callable[[int, int], None] = lambda done, rounds: None,
    record: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
) -> Evaluation | None:
    """Compute metrics of ``model`` over the batches of all ranks.

    Args:
        model: any module from images (B, C, H, W) to logits (B, K). It runs in eval mode and gets its mode back.
        batches: this rank's share; every sample is in the share of exactly one rank.
        transform: from a batch on the device to normalized images.
        metrics: by name.
        autocast: context of the forward pass.
        distributed: the ranks, and the device.
        stop: whether this rank was asked to stop; all ranks then stop together and the result is None.
        advance: called after each batch with the number of batches done and their total number.
        record: called with each batch on the device and its logits, float32, (B, K).

    Raises:
        FailedEvaluationError: an image cannot be read.
    """
    sums: dict[str, Tensor] = {}
    samples, incomplete, failure = 0, False, ""
    rounds = max(distributed.gather_objects(len(batches)))
    iterator = iter(batches)
    was_training = model.training
    model.eval()
    try:
        for done in range(1, rounds + 1):
            if distributed.agree_any(stop() or failure != ""):
                incomplete = True
                break
            try:
                batch = next(iterator, None)  # a rank may have one batch less than another
            except StopRequestedError:  # raised only if `stop` is True, which the other ranks learn in the next round
                batch, iterator, incomplete = None, iter(()), True
            except UserError as error:  # raised on all ranks below
                batch, iterator, failure = None, iter(()), str(error)
            if batch is not None:
                faults.point("evaluate.batch")
                batch = batch.to(distributed.device, non_blocking=copies_overlap(distributed.device))
                for name, counted in _count(model, batch, transform, metrics, autocast, record).items():
                    sums[name] = sums.get(name, 0) + counted
                samples += len(batch)
            advance(done, rounds)
    finally:
        model.train(was_training)
    own = [samples, {name: value.tolist() for name, value in sums.items()}, incomplete, failure]
    shares = distributed.gather_objects(own)
    if failures := [share[3] for share in shares if share[3]]:
        raise FailedEvaluationError(failures[0])
    if any(share[2] for share in shares):
        return None
    total = sum(share[0] for share in shares)
    totals = _add_up([share[1] for share in shares if share[0]])
    counts = {name: int(value) for name, value in totals.items() if value.dtype == torch.int64 and value.dim() == 0}
    values = {name: float(metrics[name].value(value, total)) for name, value in totals.items()}
    return Evaluation(values, counts, total)


@torch.inference_mode()
def _count(
    model: nn.Module,
    batch: Batch,
    transform: Callable[[Batch], Tensor],
    metrics: Mapping[str, Metric],
    autocast: Callable[[], AbstractContextManager[object]],
    record: Callable[[Batch, Tensor], None],
) -> dict[str, Tensor]:
    with autocast():
        logits_BK = model(transform(batch))
    logits_BK = logits_BK.float()
    record(batch, logits_BK)
    return {name: metric.count(logits_BK, batch.labels) for name, metric in metrics.items()}


def _add_up(shares: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Add the sums of all ranks that had batches, in the order of the ranks. JSON kept every int64 and float64 exact.

    The sums travel as JSON rather than in an all-reduce, because a rank without batches doesn't know their shapes.
    """
    names = shares[0] if shares else ()
    return {name: torch.as_tensor(np.sum([share[name] for share in shares], axis=0)) for name in names}
