"""One object that the trainer reports to; on all ranks but the first it does nothing."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from moa_train.tracking.console import Console
from moa_train.tracking.jsonl import JsonLines
from moa_train.tracking.tensorboard import TensorBoard
from moa_train.tracking.writers import Metrics, Writer


class Tracker(Writer):
    """Passes everything on to its writers; ``Tracker()`` has none."""

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self.writers = list(writers)

    def advance(self, step: int) -> None:
        """Note that ``step`` updates are done."""
        for writer in self.writers:
            writer.advance(step)

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Write training metrics."""
        for writer in self.writers:
            writer.log_step(step, metrics)

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Write the result of an evaluation."""
        for writer in self.writers:
            writer.log_eval(step, metrics, split)

    def log_images(self, step: int, images: Tensor) -> None:
        """Write a sample of the input."""
        for writer in self.writers:
            writer.log_images(step, images)

    def say(self, text: str) -> None:
        """Tell the person at the console."""
        for writer in self.writers:
            writer.say(text)

    def close(self, final: Metrics | None = None) -> None:
        """Close all writers."""
        for writer in self.writers:
            writer.close(final)


def open_tracker(
    run_dir: Path,
    *,
    total_steps: int,
    steps_per_epoch: Fraction | float,
    is_main: bool = True,
    resumed_step: int = 0,
    progress: str = "auto",
    tensorboard: bool = True,
    hyperparameters: Mapping[str, Any] | None = None,
    profile_steps: int = 0,
    stream: TextIO | None = None,
) -> Tracker:
    """Open the writers that were asked for, on the main rank only.

    ``resumed_step`` is the number of updates that the checkpoint had done: what was logged later is
    dropped. Files: ``metrics.jsonl``, ``tensorboard/`` and ``trace.json.gz`` in ``run_dir``, which must exist. For
    ``progress`` and ``stream`` see :class:`Console`.
    """
    if not is_main:
        return Tracker()
    first_step = resumed_step + 1 if resumed_step else 0
    writers: list[Writer] = [
        Console(total_steps, steps_per_epoch, first_step=resumed_step, style=progress, stream=stream),
        JsonLines(run_dir / "metrics.jsonl", first_step),
    ]
    if tensorboard:
        writers.append(TensorBoard(run_dir / "tensorboard", first_step, hyperparameters))
    if profile_steps:
        from moa_train.tracking.profile import Profile  # the profiler takes time to import

        writers.append(Profile(run_dir / "trace.json.gz", profile_steps))
    return Tracker(writers)
