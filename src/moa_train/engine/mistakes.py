"""The confusion matrix and the most confident mistakes of an evaluation."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_train.engine.metrics import has_probabilities
from moa_train.interfaces import Batch
from moa_train.runtime.distributed import Distributed

MOST = 1000
"""Classes up to which a confusion matrix is kept. A picture of more would have a pixel per cell, and gigabytes."""


@dataclass(frozen=True)
class Mistakes:
    """What an evaluation got wrong.

    Attributes:
        confusion: number of images by true and predicted class, int64, (K, K); None for more than `MOST` classes.
        index: positions of the most confident mistakes in the data set, most confident first, (M,).
        labels: their classes.
        predicted: the classes predicted for them.
        probability: the probabilities of these.
    """

    confusion: NDArray[np.int64] | None
    index: NDArray[np.int64]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float32]


class MistakesRecorder:
    """Record an evaluation. `evaluate` takes it as ``record``. The host does not wait for the device."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._classes = 0
        self._parts: list[tuple[Tensor, ...]] = []

    def __call__(self, batch: Batch, logits_BK: Tensor) -> None:
        """Record a batch."""
        self._classes = logits_BK.shape[1]
        probability_B, predicted_B = logits_BK.softmax(1).max(1)
        predicted_B = torch.where(has_probabilities(logits_BK), predicted_B, -1)
        self._parts.append((batch.index, batch.labels, predicted_B, probability_B))

    def gather(self, distributed: Distributed) -> Mistakes:
        """Return the result of all ranks, on every rank."""
        own = [torch.cat(column).tolist() for column in zip(*self._parts, strict=True)]
        shares = [share for share in distributed.gather_objects([self._classes, *own]) if share[0]]
        columns = [np.concatenate(column) for column in zip(*(share[1:] for share in shares), strict=True)]
        columns = [column[columns[2] >= 0] for column in columns]
        index, labels, predicted = (column.astype(np.int64) for column in columns[:3])
        probability, classes = columns[3].astype(np.float32), shares[0][0]
        confusion = None
        if classes <= MOST:
            confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
        # By index where probabilities are equal, so that the result does not depend on the number of ranks.
        order = np.lexsort((index, -probability))
        worst = order[(labels != predicted)[order]][: self.count]
        return Mistakes(confusion, *(column[worst] for column in (index, labels, predicted, probability)))
