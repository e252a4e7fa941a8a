"""Convert durations to steps: the learning rate schedule, and when logs, evaluations and checkpoints are due."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial

from moa_train.engine.plan import Interval, Plan
from moa_train.optim.duration import Duration
from moa_train.optim.scaling import scale_lr
from moa_train.optim.schedule import Schedule
from moa_train.plugins import SCHEDULES, short_name
from moa_train.schema import RunConfig

ToSteps = Callable[[str | None, str], Fraction]
"""Converts a duration, as written, to steps of this run; the second argument is its key, for error messages."""


def build_schedule(config: RunConfig, length: int) -> tuple[Schedule, ToSteps]:
    """Return the learning rate schedule and the conversion of durations; ``length`` is the samples per epoch."""
    settings, batch_size = config.schedule, config.engine.batch_size
    total = Duration.parse(settings.duration, what="schedule.duration", allow_zero=False).steps(batch_size, length)

    def to_steps(text: str | None, what: str) -> Fraction:
        return Duration.parse(text or "0", what=what).exact_steps(batch_size, length, total)

    def scaled(lr: float) -> float:
        return scale_lr(lr, batch_size, config.optim)

    args = SCHEDULES.args(settings.name, settings.args, "schedule.args")
    schedule = Schedule(
        name=short_name(settings.name),
        curve=partial(SCHEDULES.load(settings.name), **args),
        peak=scaled(config.optim.lr),
        total_steps=total,
        floor=scaled(settings.min_lr),
        warmup_start=scaled(settings.warmup_lr),
        warmup_steps=round(to_steps(settings.warmup, "schedule.warmup")),
        milestones=tuple(round(to_steps(mark, "schedule.milestones")) for mark in settings.milestones),
        gamma=settings.gamma,
    )
    return schedule, to_steps


def build_plan(config: RunConfig, total_steps: int, length: int, to_steps: ToSteps) -> Plan:
    """Return when logs, evaluations, checkpoints and the end of training are due."""
    engine = config.engine
    stop = -(-to_steps(engine.stop_after, "engine.stop_after") // 1) if engine.stop_after else total_steps
    return Plan(
        total_steps=total_steps,
        steps_per_epoch=Fraction(length, engine.batch_size),
        log=Interval(Fraction(config.tracking.log_every)),
        evaluate=Interval(to_steps(engine.eval_every, "engine.eval_every")),
        save=Interval(to_steps(engine.save_every, "engine.save_every")),
        keep=Interval(to_steps(engine.keep_every, "engine.keep_every")),
        stop_step=max(1, min(int(stop), total_steps)),
    )
