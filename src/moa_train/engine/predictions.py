"""What a model predicts for every image of a split: recorded during an evaluation, and the file that keeps it."""

import io
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
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole

TOP = 5
"""Number of most likely classes that the file keeps for each image."""


class Recorder:
    """Record the logits of an evaluation. `evaluate` takes it as ``record``. The host does not wait for the device."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, batch: Batch, logits_BK: Tensor) -> None:
        """Record a batch."""
        self._parts.append((batch.index, batch.labels, logits_BK))

    def gather(self, distributed: Distributed) -> "Predictions":
        """Return the predictions of all ranks, on every rank, in the order of the data set."""
        file = io.BytesIO()
        if self._parts:
            index, labels, logits = (torch.cat(column).cpu().numpy() for column in zip(*self._parts, strict=True))
            np.savez(file, index=index, labels=labels, logits=logits)
        shares = [np.load(io.BytesIO(data)) for data in distributed.gather_bytes(file.getvalue()) if data]
        index = np.concatenate([share["index"] for share in shares])
        order = np.argsort(index)
        labels, logits = (np.concatenate([share[name] for share in shares])[order] for name in ("labels", "logits"))
        return Predictions(labels, logits)


@dataclass(frozen=True)
class Predictions:
    """The logits of every image of a split, in the order of the data set.

    Attributes:
        labels: int64, (N,).
        logits: float32, (N, K).
    """

    labels: NDArray[np.int64]
    logits: NDArray[np.float32]

    def log_probabilities(self) -> NDArray[np.float32]:
        """Return the logarithm of the probability of each class, computed in float64: (N, K)."""
        return torch.from_numpy(self.logits).double().log_softmax(1).float().numpy()

    def outcomes(self, source: Any) -> "Outcomes":
        """Return what a file keeps of these predictions.

        Args:
            source: the split that was evaluated.
        """
        log_probabilities = self.log_probabilities()
        top = np.argsort(-log_probabilities, axis=1, kind="stable")[:, :TOP]
        return Outcomes(
            labels=self.labels,
            rank=rank_of_label(torch.from_numpy(self.logits), torch.from_numpy(self.labels)).numpy(),
            log_probability=np.take_along_axis(log_probabilities, self.labels[:, None], 1)[:, 0],
            top=top,
            top_log_probability=np.take_along_axis(log_probabilities, top, 1),
            classes=np.array(source.classes),
            files=np.array([], np.bytes_) if source.files is None else source.files,
            fingerprint=np.array(source.fingerprint),
        )


@dataclass(frozen=True)
class Outcomes:
    """The outcome for each of N images, as kept in ``predictions-SPLIT.npz``.

    Attributes:
        labels: (N,).
        rank: number of classes ranked before the label, (N,): 0 is a top-1 hit.
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
