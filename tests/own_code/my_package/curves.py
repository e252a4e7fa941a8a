"""A schedule: the learning rate falls with the square root of the step."""

from dataclasses import dataclass

from moa_train.knobs import knob
from moa_train.optim.schedule import Schedule


@dataclass
class RootArgs:
    scale: float = knob(10.0, "steps after which the learning rate has fallen by a factor of sqrt(2)", above=0)


def inverse_root(schedule: Schedule, step: int, args: RootArgs) -> float:
    """Return the learning rate of a step after the warmup."""
    return schedule.peak / (1 + (step - schedule.warmup_steps) / args.scale) ** 0.5
