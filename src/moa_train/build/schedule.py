"""Durations become steps: the schedule of the rate, and what is due when."""

from collections.abc import Callable
from fractions import Fraction

from moa_train.engine.plan import Cadence, Plan
from moa_train.optim import Duration, Schedule, scale_rate
from moa_train.schema import RunConfig

Distance = Callable[[str | None, str], Fraction]
"""Converts a duration of a run, as written, to steps; the second argument names its key in errors."""


def build_schedule(config: RunConfig, length: int) -> tuple[Schedule, Distance]:
    """Return the schedule of the rate, and what converts durations of this run; ``length``: samples an epoch."""
    shape, batch_size = config.schedule, config.engine.batch_size
    total = Duration.parse(shape.duration, what="schedule.duration", allow_zero=False).steps(batch_size, length)

    def distance(text: str | None, what: str) -> Fraction:
        return Duration.parse(text or "0", what=what).distance(batch_size, length, total)

    def rate(base: float) -> float:
        return scale_rate(base, batch_size, config.optim.lr_batch, config.optim.lr_scaling)

    schedule = Schedule(
        kind=shape.name,
        peak=rate(config.optim.lr),
        total_steps=total,
        floor=rate(shape.min_lr),
        warmup_start=rate(shape.warmup_lr),
        warmup_steps=round(distance(shape.warmup, "schedule.warmup")),
        milestones=tuple(round(distance(mark, "schedule.milestones")) for mark in shape.milestones),
        gamma=shape.gamma,
    )
    return schedule, distance


def build_plan(config: RunConfig, total_steps: int, length: int, distance: Distance) -> Plan:
    """Return what is due when."""
    engine = config.engine
    stop = -(-distance(engine.stop_after, "engine.stop_after") // 1) if engine.stop_after else total_steps
    return Plan(
        total_steps=total_steps,
        steps_per_epoch=Fraction(length, engine.batch_size),
        log=Cadence(Fraction(config.tracking.log_every)),
        evaluate=Cadence(distance(engine.eval_every, "engine.eval_every")),
        save=Cadence(distance(engine.save_every, "engine.save_every")),
        keep=Cadence(distance(engine.keep_every, "engine.keep_every")),
        stop_step=max(1, min(int(stop), total_steps)),
    )
