"""The one object that the trainer reports to."""

from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch import Tensor

from moa_train.tracking.console import Console
from moa_train.tracking.jsonl import JsonLines, read_rows
from moa_train.tracking.logger import Logger, Metrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Tracker(Logger):
    """Pass everything to a list of loggers, in order. ``Tracker()`` discards everything.

    Args:
        loggers: the loggers.
        known: (step, split) of evaluations that are logged already; a run that was killed after it had logged one may
            repeat it.
    """

    def __init__(self, loggers: Sequence[Logger] = (), known: Collection[tuple[int, str]] = ()) -> None:
        self._loggers, self._known = loggers, known

    def advance(self, step: int) -> None:
        """Note that ``step`` updates are complete."""
        for logger in self._loggers:
            logger.advance(step)

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Record training metrics."""
        for logger in self._loggers:
            logger.log_step(step, metrics)

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Record the result of an evaluation."""
        for logger in self._loggers if (step, split) not in self._known else ():
            logger.log_eval(step, metrics, split)

    def log_images(self, step: int, images: Tensor, captions: Sequence[str] = (), name: str = "train/input") -> None:
        """Record images with their captions."""
        for logger in self._loggers:
            logger.log_images(step, images, captions, name)

    def log_confusion(
        self, step: int, counts_KK: "NDArray[np.int64]", classes: Sequence[str], split: str = "val"
    ) -> None:
        """Record the confusion matrix of an evaluation."""
        for logger in self._loggers:
            logger.log_confusion(step, counts_KK, classes, split)

    def say(self, text: str) -> None:
        """Show a message to the user."""
        for logger in self._loggers:
            logger.say(text)

    def close(self, final: Metrics | None = None) -> None:
        """Close all loggers."""
        for logger in self._loggers:
            logger.close(final)


def open_tracker(
    run_dir: Path,
    *,
    total_steps: int,
    steps_per_epoch: Fraction | float,
    is_main: bool = True,
    resumed_step: int = 0,
    progress: str = "auto",
    loggers: Sequence[Callable[[Path, int, Mapping[str, Any]], Logger]] = (),
    config: Mapping[str, Any] | None = None,
    profile_steps: int = 0,
    remeasured: bool = False,
    stream: TextIO | None = None,
) -> Tracker:
    """Open the console, ``metrics.jsonl`` and ``loggers`` on rank 0; the other ranks get a tracker without loggers.

    Args:
        run_dir: the run folder, which must exist.
        total_steps: number of updates at the end of this session.
        steps_per_epoch: number of updates per epoch; not necessarily whole.
        is_main: whether this is rank 0.
        resumed_step: number of updates in the checkpoint that the run resumes from; rows of later steps are dropped.
        progress: see `Console`.
        loggers: further loggers: subclasses of `Logger`, or functions with the same parameters.
        config: the configuration of the run, for the loggers.
        profile_steps: if positive, trace so many steps into ``trace.json.gz``.
        remeasured: whether evaluations measure something else than before. Otherwise, one that is logged already is not
            logged again.
        stream: where the console writes; standard output by default.
    """
    if not is_main:
        return Tracker()
    first_step = resumed_step + 1 if resumed_step else 0
    opened: list[Logger] = [
        Console(total_steps, steps_per_epoch, first_step=resumed_step, style=progress, stream=stream),
        JsonLines(run_dir / "metrics.jsonl", first_step),  # before the loggers, which may read it
    ]
    opened += [create(run_dir, first_step, config or {}) for create in loggers]
    if profile_steps:
        from moa_train.tracking.profile import Profile  # importing the profiler is slow

        opened.append(Profile(run_dir / "trace.json.gz", profile_steps))
    rows = [] if remeasured else read_rows(run_dir / "metrics.jsonl")
    return Tracker(opened, {(row["step"], row["split"]) for row in rows if row["kind"] == "eval"})
