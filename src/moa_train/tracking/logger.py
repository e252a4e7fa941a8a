"""What receives the logs of a training: the base class of all loggers, including your own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Metrics = Mapping[str, float | int | str | bool | None]


class Logger:
    """Receive what the trainer reports. Every method does nothing unless a subclass overrides it.

    ``tracking.loggers`` names subclasses. Each is called as ``Name(run_dir, first_step, config)``, on rank 0 only:
    the run folder, the first step that will be logged, and the configuration of the run as nested dictionaries. A
    resumed training logs ``first_step`` and later steps again, so a logger must discard what it has of them. At that
    point, ``metrics.jsonl`` in the run folder holds the rows of all earlier steps (see `tracking.jsonl.read_rows`).

    A step is the number of completed updates. Accuracies are in percent, times in seconds, memory in bytes.
    """

    def advance(self, step: int) -> None:
        """Note that ``step`` updates are complete. This is called after every update and must be cheap."""

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Record training metrics: loss, lr, grad_norm, images_per_second, memory, ..."""

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Record the result of an evaluation: loss, top1, top5, ..."""

    def log_images(self, step: int, images: "Tensor", captions: Sequence[str] = (), name: str = "train/input") -> None:
        """Record images: a sample of the model's input (train/input), or the worst mistakes (SPLIT/mistakes).

        Args:
            step: number of completed updates.
            images: uint8, B C H W with 1 or 3 channels.
            captions: a text for each image, such as its mixed label.
            name: what the images are.
        """

    def log_confusion(
        self, step: int, counts_KK: "NDArray[np.int64]", classes: Sequence[str], split: str = "val"
    ) -> None:
        """Record the confusion matrix of an evaluation: rows are true classes, columns predicted ones, (K, K)."""

    def say(self, text: str) -> None:
        """Show a message to the user."""

    def close(self, final: Metrics | None = None) -> None:
        """Write what is pending and release resources. A second call must do nothing.

        Args:
            final: the final metrics of a training that ran to its end.
        """


def numbers(prefix: str, metrics: Metrics) -> dict[str, float]:
    """Return the numeric metrics under the names ``prefix/name``."""
    return {
        f"{prefix}/{name}": float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
