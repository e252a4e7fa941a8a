"""The learning rate as a pure function of the step."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from moa_train.runtime.errors import UserError

Curve = Callable[["Schedule", int], float]
"""Returns the learning rate of a schedule at a step after the warmup. Your own schedule is such a function."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate of update ``t``, counted from 0, of ``T = total_steps`` with ``w = warmup_steps``.

    The warmup is part of the total and ends where the curve begins, without a jump::

        t < w       warmup_start + (peak - warmup_start) t / w
        t >= w      curve(t); with p = (t - w) / (T - w), which is 0 at the end of the warmup and 1 at t = T:
          cosine      floor + (peak - floor) (1 + cos(pi p)) / 2
          linear      floor + (peak - floor) (1 - p)
          step        max(floor, peak gamma^(milestones at or before t))
          constant    peak

    The floor is reached at ``t = T``, one step after the last update, so that a floor of 0 wastes no update. The first
    update of a warmup has the learning rate ``warmup_start``, which may be 0. Learning rates are already scaled to the
    batch size; milestones are steps.
    """

    name: str
    curve: Curve
    peak: float
    total_steps: int
    floor: float = 0.0
    warmup_start: float = 0.0
    warmup_steps: int = 0
    milestones: tuple[int, ...] = ()
    gamma: float = 1.0

    def __post_init__(self) -> None:
        self._check_lrs()
        self._check_lengths()

    def lr(self, step: int) -> float:
        """Return the learning rate of update ``step``; past the end it keeps its final value."""
        step = min(max(step, 0), self.total_steps)
        if step < self.warmup_steps:
            return self.warmup_start + (self.peak - self.warmup_start) * step / self.warmup_steps
        return self.curve(self, step)

    def progress(self, step: int) -> float:
        """Return the fraction of the time after the warmup that has passed at ``step``, 0 to 1."""
        return (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)

    def describe(self) -> str:
        """Describe the schedule in one line."""
        warmup = f", {self.warmup_steps} of warmup from {self.warmup_start:.3g}" if self.warmup_steps else ""
        end = f" -> {self.lr(self.total_steps):.3g}" if self.lr(self.total_steps) != self.peak else ""
        return f"{self.name} {self.peak:.3g}{end} over {self.total_steps} steps{warmup}"

    def _check_lrs(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise UserError(f"The peak learning rate is {self.peak}; it must be above 0. Change optim.lr.")
        for key, value in (("min_lr", self.floor), ("warmup_lr", self.warmup_start)):
            if not 0 <= value <= self.peak:
                raise UserError(
                    f"schedule.{key} is {value:.4g} (scaled); it must be between 0 and the "
                    f"peak, {self.peak:.4g}. Lower schedule.{key}, or raise optim.lr."
                )

    def _check_lengths(self) -> None:
        if self.total_steps < 1:
            raise UserError(
                f"The run has {self.total_steps} steps; it must have at least 1. Increase schedule.duration."
            )
        if self.warmup_steps > self.total_steps:
            raise UserError(
                f"The warmup ({self.warmup_steps} steps) is longer than the run ({self.total_steps} steps). "
                "Shorten schedule.warmup, for example to '5%', or increase schedule.duration."
            )
        marks = self.milestones
        if any(late < early for early, late in pairwise(marks)):
            raise UserError(f"schedule.milestones are at steps {list(marks)}; they must be in ascending order.")
        if marks and (marks[0] <= self.warmup_steps or marks[-1] > self.total_steps):
            raise UserError(
                f"schedule.milestones are at steps {list(marks)}; they must be after the warmup "
                f"({self.warmup_steps}) and before the end of the run ({self.total_steps})."
            )


def cosine(schedule: Schedule, step: int) -> float:
    """Follow half a period of a cosine from the peak to the floor."""
    return schedule.floor + (schedule.peak - schedule.floor) * (1 + math.cos(math.pi * schedule.progress(step))) / 2


def linear(schedule: Schedule, step: int) -> float:
    """Fall in a straight line from the peak to the floor."""
    return schedule.floor + (schedule.peak - schedule.floor) * (1 - schedule.progress(step))


def step(schedule: Schedule, step: int) -> float:
    """Multiply by gamma at each milestone, but not below the floor."""
    return max(schedule.floor, schedule.peak * schedule.gamma ** bisect_right(schedule.milestones, step))


def constant(schedule: Schedule, step: int) -> float:
    """Stay at the peak."""
    return schedule.peak
