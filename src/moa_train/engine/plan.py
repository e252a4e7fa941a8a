"""When things are due: the length of a run and the steps of its evaluations and checkpoints."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Interval:
    """Something is due every ``steps`` steps, which need not be a whole number; 0 means never.

    The k-th time is the first step at or after k x steps, so it does not depend on when a session started.
    """

    steps: Fraction

    def due(self, step: int) -> bool:
        """Return whether update number ``step`` (counted from 1) reached a multiple of the interval."""
        return self.steps > 0 and step // self.steps > (step - 1) // self.steps


@dataclass(frozen=True)
class Plan:
    """The course of a run, in optimizer steps."""

    total_steps: int
    steps_per_epoch: Fraction
    log: Interval
    evaluate: Interval
    save: Interval
    keep: Interval  # checkpoints that are kept permanently
    stop_step: int  # total_steps, or less if this session stops early

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is due after update number ``step``, apart from best ones."""
        return self.save.due(step) or self.keep.due(step) or step == self.stop_step

    def __post_init__(self) -> None:
        assert 0 < self.stop_step <= self.total_steps
