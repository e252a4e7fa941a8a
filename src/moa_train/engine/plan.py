"""The length of a run, and the steps at which it logs, evaluates and saves."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Interval:
    """An interval of ``steps`` steps, not necessarily a whole number; 0 means never.

    The k-th occurrence is at the first step at or after k x steps, whenever a session started.
    """

    steps: Fraction

    def due(self, step: int) -> bool:
        """Return whether update number ``step``, counted from 1, reached a multiple of the interval."""
        return self.steps > 0 and step // self.steps > (step - 1) // self.steps


@dataclass(frozen=True)
class Plan:
    """The course of a run, in optimizer steps.

    Attributes:
        keep: interval of the checkpoints that are kept permanently.
        stop_step: the last step of this session: ``total_steps``, or less with ``engine.stop_after``.
    """

    total_steps: int
    steps_per_epoch: Fraction
    log: Interval
    evaluate: Interval
    save: Interval
    keep: Interval
    stop_step: int

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is due after update number ``step``, whatever its evaluation."""
        return self.save.due(step) or self.keep.due(step) or step == self.stop_step

    def __post_init__(self) -> None:
        assert 0 < self.stop_step <= self.total_steps
