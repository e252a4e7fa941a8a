"""The console: a progress bar on a terminal or plain lines elsewhere, and a table of epochs and evaluations."""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TextIO

from tqdm import tqdm

from moa_train.tracking.logger import Logger, Metrics
from moa_train.tracking.meters import Speed

_COLUMNS = {  # heading: width; 80 in all, with the mark of the best
    "epoch": 6, "step": 8, "split": 6, "loss": 9, "top-1": 7, "top-5": 7, "train loss": 12, "images/s": 10, "time": 9,
}  # fmt: skip


class Console(Logger):
    """Write progress and a row for every epoch and evaluation to ``stream``, by default standard output.

    With ``style="bar"``, progress is one line that is redrawn; with ``plain``, it is a new line every ``line_seconds``
    seconds, without control characters; ``auto`` selects the bar if ``stream`` is a terminal.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: Fraction | float,
        *,
        first_step: int = 0,
        style: str = "auto",
        line_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stream = stream or sys.stdout
        self._has_bar = _has_bar(self._stream, style)
        self._has_style = _is_terminal(self._stream) and not os.environ.get("NO_COLOR")
        self._total_steps = total_steps
        self._steps_per_epoch = Fraction(steps_per_epoch)
        self._line_seconds = line_seconds
        self._clock = clock
        self._started = clock()
        self._line_due = self._started
        self._speed = Speed(clock=clock)
        self._bar: _Bar | None = None
        self._step = first_step
        self._latest: Metrics = {}
        self._train_loss = _MeanLoss(first_step)
        self._row_epoch = self._epochs(first_step)
        self._has_header = False

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        self._finish_epoch(step - 1)
        self._speed.tick(step - self._step)
        if self._has_bar:
            self._bar = self._bar or _Bar(self._total_steps, self._step, self._epoch_label(step), self._stream)
            self._bar.desc = self._epoch_label(step)
            self._bar.update(step - self._step)
        self._step = step

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Show the latest metrics next to the bar, or as a line if one is due."""
        self._latest = metrics
        self._train_loss.add(step, metrics.get("loss"))
        parts = self._progress(metrics)
        if self._bar is not None:
            self._bar.parts = parts
        elif self._clock() >= self._line_due or step == self._total_steps:
            self._line_due = self._clock() + self._line_seconds
            self.say("  ".join([self._epoch_label(step), f"step {step}/{self._total_steps}", *parts]))

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Write a row of the table, marked as the best if ``metrics["best"]`` is true."""
        self._row(step, metrics, split)
        self._speed.restart()

    def say(self, text: str) -> None:
        """Write ``text`` above the bar."""
        _say(text, self._bar, self._stream)

    def close(self, final: Metrics | None = None) -> None:
        """Finish the table and leave the bar on the screen."""
        self._finish_epoch(self._step)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _progress(self, metrics: Metrics) -> list[str]:
        """Return the latest metrics as text, most important first: a narrow terminal omits the last ones."""
        left = self._speed.seconds_left(self._total_steps - self._step)
        parts = (
            _number("loss {:.4f}", metrics.get("loss")),
            _number("{:.0f} images/s", metrics.get("images_per_second")),
            "" if left is None else f"{clock_time(left)} left",
            _number("lr {:.1e}", metrics.get("lr")),
            _number("{:.1f} GB", metrics.get("memory"), 1e-9),
        )
        return [part for part in parts if part]

    def _epochs(self, step: int) -> int:
        """Return the number of epochs that are complete at ``step``."""
        return int(step // self._steps_per_epoch)

    def _epoch_label(self, step: int) -> str:
        """Return the epoch in which update ``step`` starts. Epochs need not be whole steps: 3 of 20.2 take 61 steps."""
        return f"epoch {self._epochs(max(step - 1, 0)) + 1}/{self._epochs(self._total_steps - 1) + 1}"

    def _finish_epoch(self, step: int) -> None:
        """Write a row if an epoch is complete at ``step`` and no evaluation has written its row."""
        if self._epochs(step) > self._row_epoch and self._train_loss.steps:
            self._row(step, {}, "-")

    def _row(self, step: int, metrics: Metrics, split: str) -> None:
        if not self._has_header:
            self._has_header = True
            header = _aligned(list(_COLUMNS))
            self.say(f"\x1b[1m{header}\x1b[0m" if self._has_style else header)
        epochs, is_epoch_end = self._epochs(step), self._epochs(step) > self._epochs(step - 1)
        self._row_epoch = epochs
        cells = [
            str(epochs) if is_epoch_end else f"{float(step / self._steps_per_epoch):.2f}",
            str(step),
            split,
            _number("{:.4f}", metrics.get("loss")),
            _number("{:.2f}", metrics.get("top1")),
            _number("{:.2f}", metrics.get("top5")),
            _number("{:.4f}", self._train_loss.read()),
            _number("{:.0f}", self._latest.get("images_per_second")),
            clock_time(self._clock() - self._started),
        ]
        self.say(_aligned([cell or "-" for cell in cells]) + ("  best" if metrics.get("best") else ""))


class EvaluationProgress:
    """Show the progress of evaluations by a bar that disappears, or by a line every ``line_seconds`` seconds.

    Evaluations shorter than that write no line.
    """

    def __init__(
        self,
        title: str,
        *,
        style: str = "auto",
        line_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._title = title
        self._stream = stream or sys.stdout
        self._has_bar = _has_bar(self._stream, style)
        self._line_seconds = line_seconds
        self._clock = clock
        self._bar: _Bar | None = None

    def __call__(self, done: int, rounds: int) -> None:
        """Note that ``done`` of ``rounds`` batches are complete."""
        if done == 1:  # a new evaluation
            self._speed = Speed(clock=self._clock)
            self._line_due = self._clock() + self._line_seconds
            if self._has_bar:
                self._bar = _Bar(rounds, 0, self._title, self._stream, unit="batch", leave=False)
        self._speed.tick(1)
        left = self._speed.seconds_left(rounds - done)
        parts = [] if left is None else [f"{clock_time(left)} left"]
        if self._bar is not None:
            self._bar.parts = parts
            self._bar.update()
            if done == rounds:
                self.close()
        elif not self._has_bar and self._clock() >= self._line_due and done < rounds:
            self._line_due = self._clock() + self._line_seconds
            self.say("  ".join([self._title, f"batch {done}/{rounds}", *parts]))

    def say(self, text: str) -> None:
        """Write ``text`` above the bar."""
        _say(text, self._bar, self._stream)

    def close(self) -> None:
        """Remove the bar, if an evaluation ended early."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _has_bar(stream: TextIO, style: str) -> bool:
    return _is_terminal(stream) if style == "auto" else style == "bar"


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class _MeanLoss:
    """Average the logged losses, each weighted by the number of steps it covers."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._sum = 0.0
        self.steps = 0

    def add(self, step: int, loss: object) -> None:
        if isinstance(loss, int | float):
            self._sum += loss * (step - self._step)
            self.steps += step - self._step
        self._step = step

    def read(self) -> float | None:
        mean = self._sum / self.steps if self.steps else None
        self._sum, self.steps = 0.0, 0
        return mean


class _Bar(tqdm):
    """A tqdm bar without a monitoring thread and a lock between processes, since a training forks and may be killed."""

    monitor_interval = 0
    parts: Sequence[str] = ()  # the text after the bar, most important first

    def __init__(
        self, total: int, initial: int, label: str, stream: TextIO, *, unit: str = "step", leave: bool = True
    ) -> None:
        super().__init__(
            total=total,
            initial=initial,
            desc=label,
            file=stream,
            unit=unit,
            leave=leave,
            dynamic_ncols=True,
            mininterval=0.2,
            bar_format="{label} |{bar}| {percentage:3.0f}%  {unit} {n_fmt}/{total_fmt}  {text}",
        )

    @property
    def format_dict(self) -> dict[str, object]:
        """Fields for ``bar_format``, with as many parts as fit while the bar keeps ten columns."""
        known = super().format_dict
        room = (known["ncols"] or 80) - len(f"{self.desc} || 100%  {self.unit} {self.n}/{self.total}") - 10
        parts = list(self.parts)
        while parts and sum(len(part) + 2 for part in parts) > room:
            parts.pop()
        return {**known, "label": self.desc, "text": "  ".join(parts)}


_Bar.set_lock(threading.RLock())


def _say(text: str, bar: _Bar | None, stream: TextIO) -> None:
    if bar is not None:
        bar.write(text, file=stream)
    else:
        stream.write(text + "\n")
    stream.flush()


def block(title: str, rows: Mapping[str, object]) -> str:
    """Return a banner or report: a title, then aligned names and values, without those that are None."""
    shown = {name: value for name, value in rows.items() if value is not None}
    width = max((len(name) for name in shown), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in shown.items())])


def clock_time(seconds: float) -> str:
    """Format seconds as 0:07, 12:34, 1:02:03 or 2d 03:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _aligned(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))


def _number(form: str, value: object, scale: float = 1.0) -> str:
    return form.format(value * scale) if isinstance(value, int | float) else ""
