"""What a model predicts for every image of a split: recorded during an evaluation, and the file that keeps it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_train.engine.metrics import rank_of_label
from moa_train.interfaces import Batch
from moa_train.runtime.device import has_float64
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole

TOP = 5
"""Number of most likely classes that the file keeps for each image."""


class Recorder:
    """Record the logits of an evaluation. `evaluate` takes it as ``record``. The host does not wait for the device."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def __call__(self, batch: Batch, logits_BK: Tensor) -> None:
        """Record a batch."""
        self._parts.append((batch.index, batch.labels, logits_BK))

    def gather(self, distributed: Distributed) -> "Predictions":
        """Return the predictions of all ranks, on every rank, in the order of the data set."""
        return Predictions(*_gathered(self._parts, distributed))


class OutcomeRecorder:
    """Record only what `Outcomes` keeps, because the logits of a million images and many classes need gigabytes."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def __call__(self, batch: Batch, logits_BK: Tensor) -> None:
        """Record a batch."""
        self._parts.append((batch.index, batch.labels, *_outcome(logits_BK, batch.labels)))

    def gather(self, distributed: Distributed, source: Any) -> "Outcomes":
        """Return the outcomes of all ranks, on every rank, in the order of the split ``source``."""
        return Outcomes.of(source, *_gathered(self._parts, distributed))


def _gathered(parts: Sequence[tuple[Tensor, ...]], distributed: Distributed) -> list[NDArray[Any]]:
    """Return the columns after the first one, the index of the image, of all ranks in the order of the index."""
    file = io.BytesIO()
    if parts:
        np.savez(file, *(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))
    shares = [np.load(io.BytesIO(data)) for data in distributed.gather_bytes(file.getvalue()) if data]
    columns = [np.concatenate([share[name] for share in shares]) for name in shares[0].files]
    order = np.argsort(columns[0])
    return [column[order] for column in columns[1:]]


def _outcome(logits_BK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rank and log-probability of the label, and the most likely classes with their log-probabilities."""
    logits_BK = logits_BK if has_float64(logits_BK.device) else logits_BK.cpu()
    labels_B = labels_B.to(logits_BK.device)
    log_BK = log_probabilities(logits_BK)
    top_BT = (-log_BK).sort(stable=True).indices[:, :TOP]
    label_B = log_BK.gather(1, labels_B[:, None])[:, 0]
    return rank_of_label(logits_BK, labels_B), label_B, top_BT, log_BK.gather(1, top_BT)


def log_probabilities(logits_NK: Tensor) -> Tensor:
    """Return the logarithm of the probability of each class, computed in float64: float32, (N, K)."""
    return logits_NK.double().log_softmax(1).float()


@dataclass(frozen=True)
class Predictions:
    """The logits of every image of a split, in the order of the data set.

    Attributes:
        labels: int64, (N,).
        logits: float32, (N, K).
    """

    labels: NDArray[np.int64]
    logits: NDArray[np.float32]

    def outcomes(self, source: Any) -> "Outcomes":
        """Return what a file keeps of these predictions.

        Args:
            source: the split that was evaluated.
        """
        found = _outcome(torch.from_numpy(self.logits), torch.from_numpy(self.labels))
        return Outcomes.of(source, self.labels, *(column.numpy() for column in found))


@dataclass(frozen=True)
class Outcomes:
    """The outcome for each of N images, as kept in ``predictions-SPLIT.npz``.

    Attributes:
        labels: (N,).
        rank: number of classes ranked before the label, (N,): 0 is a top-1 hit; see `rank_of_label`.
        log_probability: natural logarithm of the probability of the label, float32, (N,). Its negative is the loss.
        top: the most likely classes, most likely first, (N, 5) or (N, K).
        top_log_probability: logarithms of their probabilities, float32, same shape.
        classes: names of the classes, (K,).
        files: path of each image relative to the folder of its split, (N,), or (0,) if unknown.
        fingerprint: of the split, as in provenance.json.
    """

    labels: NDArray[np.int64]
    rank: NDArray[np.int64]
    log_probability: NDArray[np.float32]
    top: NDArray[np.int64]
    top_log_probability: NDArray[np.float32]
    classes: NDArray[np.str_]
    files: NDArray[np.bytes_]
    fingerprint: NDArray[np.str_]

    @classmethod
    def of(cls, source: Any, *columns: NDArray[Any]) -> "Outcomes":
        """Return the outcomes for the images of a split, given the first five attributes."""
        labels, rank, log_probability, top, top_log_probability = columns
        files = np.array([], np.bytes_) if source.files is None else source.files
        classes, fingerprint = np.array(source.classes), np.array(source.fingerprint)
        return cls(labels, rank, log_probability, top, top_log_probability, classes, files, fingerprint)

    def write(self, path: Path) -> None:
        """Write the file, a few hundred kilobytes for 10,000 images. Raises UserError if that fails."""
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **vars(self))
        write_whole(path, file.getvalue())

    @classmethod
    def read(cls, path: Path) -> "Outcomes":
        """Read the file. Nothing in it is executed.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in cls.__annotations__})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"{path} cannot be read ({error}). moa-eval ckpt=RUN writes this file again.") from error


def predictions_file(folder: Path, split: str) -> Path:
    """Return the path of the file in a run folder, or in the folder of other weights."""
    return folder / f"predictions-{split}.npz"
