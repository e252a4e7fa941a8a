"""The console: a progress bar on a terminal, plain lines elsewhere, a table of evaluations."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from moa_train.tracking.meters import Speed
from moa_train.tracking.writers import Metrics, Writer

_COLUMNS = {  # heading: width
    "epoch": 7, "step": 9, "split": 9, "loss": 9, "top-1": 8, "top-5": 8, "train loss": 12, "images/s": 10, "time": 9,
}  # fmt: skip


class Console(Writer):
    """Writes to ``stream`` (standard output): a bar that moves with each step where it is a terminal, else a
    line every ``line_seconds`` seconds and no carriage returns. Each epoch and each evaluation gets a row of a table.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: float,
        *,
        first_step: int = 0,
        line_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._line_seconds = line_seconds
        self._clock = clock
        self._speed = Speed(clock=clock)
        self._bar: Any = None
        self._started = clock()
        self._line_due = self._started
        self._step = first_step
        self._latest: Metrics = {}
        self._logged_step = first_step
        self._loss_sum = 0.0
        self._loss_steps = 0
        self._epoch_row = int(first_step / steps_per_epoch)
        self._has_header = False

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._finish_epoch(step)
        self._speed.tick(step - self._step)
        if self._is_terminal:
            self._bar = self._bar or self._open_bar()
            self._bar.update(step - self._bar.n)
        self._step = step

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Show the latest metrics: beside the bar, or as a line when one is due."""
        if step > self._step:
            self.advance(step)
        self._latest = metrics
        self._loss_sum += float(metrics.get("loss") or 0.0) * (step - self._logged_step)
        self._loss_steps += step - self._logged_step
        self._logged_step = step
        text = self._progress(metrics)
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {self._epoch_of(step)}", refresh=False)
            self._bar.set_postfix_str(text, refresh=False)
        elif self._clock() >= self._line_due or step == self._total_steps:
            self._line_due = self._clock() + self._line_seconds
            self.say(f"epoch {self._epoch_of(step)}  step {step}/{self._total_steps}  {text}")

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Write a row of the table."""
        self._row(step, metrics, split)
        self._speed.restart()

    def say(self, text: str) -> None:
        """Write text above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self, final: Metrics | None = None) -> None:
        """Finish the table and leave the bar as it is."""
        self._finish_epoch(self._step + 1)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open_bar(self) -> Any:
        return tqdm(
            total=self._total_steps,
            initial=self._step,
            file=self._stream,
            dynamic_ncols=True,
            mininterval=0.2,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}  {postfix}",
        )

    def _progress(self, metrics: Metrics) -> str:
        left = self._speed.seconds_left(self._total_steps - self._step)
        parts = [
            _number("loss {:.4f}", metrics.get("loss")),
            _number("rate {:.2e}", metrics.get("rate")),
            _number("{:.0f} images/s", metrics.get("images_per_second")),
            f"{clock_time(left)} left" if left is not None else "",
            _number("{:.2f} GB", metrics.get("memory"), 1e-9),
        ]
        return "  ".join(part for part in parts if part)

    def _epoch_of(self, step: int) -> str:
        total = -(-self._total_steps // self._steps_per_epoch)
        return f"{min(int(max(step - 1, 0) // self._steps_per_epoch) + 1, int(total))}/{int(total)}"

    def _finish_epoch(self, step: int) -> None:
        """Write the row of an epoch that ended before ``step`` without an evaluation."""
        if int((step - 1) / self._steps_per_epoch) > self._epoch_row and self._loss_steps:
            self._row(step - 1, {}, "-")

    def _row(self, step: int, metrics: Metrics, split: str) -> None:
        self._epoch_row = int(step / self._steps_per_epoch)
        train_loss = self._loss_sum / self._loss_steps if self._loss_steps else None
        self._loss_sum, self._loss_steps = 0.0, 0
        cells = [
            f"{step / self._steps_per_epoch:.4g}",
            str(step),
            split,
            _number("{:.4f}", metrics.get("loss")),
            _number("{:.2f}", metrics.get("top1")),
            _number("{:.2f}", metrics.get("top5")),
            _number("{:.4f}", train_loss),
            _number("{:.0f}", self._latest.get("images_per_second")),
            clock_time(self._clock() - self._started),
        ]
        if not self._has_header:
            self._has_header = True
            self.say(self._style("1", _aligned(_COLUMNS)))
        self.say(_aligned([cell or "-" for cell in cells]) + ("  best" if metrics.get("best") else ""))

    def _style(self, code: str, text: str) -> str:
        colour = self._is_terminal and not os.environ.get("NO_COLOR")
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def block(title: str, rows: Mapping[str, object], lines: Sequence[str] = ()) -> str:
    """Compose a start-up banner or a final report: a title, aligned names and values, then plain lines."""
    width = max((len(name) for name in rows), default=0)
    body = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([title, *body, *(f"  {line}" for line in lines)])


def clock_time(seconds: float) -> str:
    """Write seconds as 0:07, 12:34, 1:02:03 or 2d 03:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _aligned(cells: Sequence[str] | Mapping[str, int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))


def _number(form: str, value: object, scale: float = 1.0) -> str:
    return form.format(value * scale) if isinstance(value, int | float) else ""
