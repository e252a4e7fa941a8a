"""The learning rate as a pure function of the step."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from moa_train.runtime.errors import UserError, choose

KINDS = ("cosine", "linear", "step", "constant")


@dataclass(frozen=True)
class Schedule:
    """Rate of update ``t``, counted from 0, of ``T = total_steps`` with ``w = warmup_steps``.

    Warm-up lies inside the total and ends, without a jump, where the curve begins::

        t < w       warmup_start + (peak - warmup_start) t / w
        t >= w      with p = (t - w) / (T - w), which is 0 at the end of the warm-up and 1 at t = T:
          cosine      floor + (peak - floor) (1 + cos(pi p)) / 2
          linear      floor + (peak - floor) (1 - p)
          step        max(floor, peak gamma^(milestones at or before t))
          constant    peak
        t > T - c   a straight line from the curve's rate at T - c to the floor at T, if c = cooldown_steps > 0

    The floor belongs to ``t = T``, one past the last update, so that no update is wasted on a floor of 0.
    Rates are final (scaled to the batch already); milestones are steps.
    """

    kind: str
    peak: float
    total_steps: int
    floor: float = 0.0
    warmup_start: float = 0.0
    warmup_steps: int = 0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    cooldown_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(choose("schedule.name", self.kind, KINDS))
        self._check_rates()
        self._check_lengths()

    def rate(self, step: int) -> float:
        """Return the rate of update ``step``; past the end it stays where the schedule ended."""
        step = min(max(step, 0), self.total_steps)
        if step < self.warmup_steps:
            return self.warmup_start + (self.peak - self.warmup_start) * step / self.warmup_steps
        start = self.total_steps - self.cooldown_steps
        if self.cooldown_steps and step > start:
            left = (self.total_steps - step) / self.cooldown_steps
            return self.floor + (self._curve(start) - self.floor) * left
        return self._curve(step)

    def describe(self) -> str:
        """Say in one line what the rate does."""
        warmup = f", {self.warmup_steps} of warm-up from {self.warmup_start:.3g}" if self.warmup_steps else ""
        cooldown = f", {self.cooldown_steps} of cool-down" if self.cooldown_steps else ""
        end = f" -> {self.rate(self.total_steps):.3g}" if self.rate(self.total_steps) != self.peak else ""
        return f"{self.kind} {self.peak:.3g}{end} over {self.total_steps} steps{warmup}{cooldown}"

    def _curve(self, step: int) -> float:
        """Return the rate at ``step`` >= warm-up, cool-down left aside."""
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        match self.kind:
            case "cosine":
                return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * progress)) / 2
            case "linear":
                return self.floor + (self.peak - self.floor) * (1 - progress)
            case "step":
                return max(self.floor, self.peak * self.gamma ** bisect_right(self.milestones, step))
        return self.peak

    def _check_rates(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise UserError(f"Learning rate (optim.lr, scaled) {self.peak} must be a number above 0.")
        for name, value in (("floor", self.floor), ("warm-up start", self.warmup_start)):
            if not 0 <= value <= self.peak:
                raise UserError(f"Learning rate {name} {value:.4g} must lie between 0 and the peak {self.peak:.4g}.")
        if not 0 < self.gamma <= 1:
            raise UserError(f"schedule.gamma={self.gamma} must be above 0 and at most 1.")

    def _check_lengths(self) -> None:
        if self.total_steps < 1:
            raise UserError(f"Training takes {self.total_steps} steps; it must take at least 1.")
        if min(self.warmup_steps, self.cooldown_steps) < 0:
            raise UserError("Warm-up and cool-down cannot be negative.")
        if self.warmup_steps + self.cooldown_steps > self.total_steps:
            raise UserError(
                f"Warm-up ({self.warmup_steps} steps) and cool-down ({self.cooldown_steps}) are longer than the "
                f"training ({self.total_steps}). Shorten them, for instance to '5%', or train for longer."
            )
        marks = self.milestones
        if self.kind == "step" and not marks:
            raise UserError("A step schedule needs milestones, such as schedule.milestones=[50%,75%].")
        if any(late < early for early, late in pairwise(marks)):
            raise UserError(f"Milestones {list(marks)} (in steps) must be in order.")
        if marks and (marks[0] <= self.warmup_steps or marks[-1] > self.total_steps):
            raise UserError(
                f"Milestones {list(marks)} (in steps) must lie after the warm-up "
                f"({self.warmup_steps}) and before the end of the training ({self.total_steps})."
            )
