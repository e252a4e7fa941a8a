"""When things are due: the length of a run and the steps of its evaluations and checkpoints."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Cadence:
    """Something that falls due every ``distance`` steps, which need not be whole; 0 means never.

    The k-th time is the first step at or after k x distance, so it depends on the step alone and not on when a session
    began.
    """

    distance: Fraction

    def due(self, step: int) -> bool:
        """Tell whether a multiple of the distance was reached by update number ``step`` (counted from 1)."""
        return self.distance > 0 and step // self.distance > (step - 1) // self.distance


@dataclass(frozen=True)
class Plan:
    """The course of a run, in optimizer steps."""

    total_steps: int
    steps_per_epoch: Fraction
    log: Cadence
    evaluate: Cadence
    save: Cadence
    keep: Cadence  # checkpoints that stay for ever
    stop_step: int  # total_steps, or earlier where this session shall end sooner

    def saves(self, step: int) -> bool:
        """Tell whether a checkpoint is due after update number ``step``, whatever else asks for one."""
        return self.save.due(step) or self.keep.due(step) or step == self.stop_step

    def __post_init__(self) -> None:
        assert 0 < self.stop_step <= self.total_steps
