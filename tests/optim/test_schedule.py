import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from moa_train.optim.schedule import Schedule
from moa_train.plugins import SCHEDULES
from moa_train.runtime.errors import UserError

PEAK, FLOOR, START = 9e-4, 5e-6, 9e-7


def make(name: str, peak: float, total_steps: int, **changes: Any) -> Schedule:
    return Schedule(name, SCHEDULES.load(name), peak, total_steps, **changes)


def lrs_of_torch(total: int, warmup: int, after_warmup: Any) -> list[float]:
    """Drive torch's own scheduler: a linear warmup, then the scheduler that ``after_warmup`` returns."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    after = after_warmup(optimizer)
    if warmup:
        before = lr_scheduler.LinearLR(optimizer, START / PEAK, 1.0, total_iters=warmup)
        after = lr_scheduler.SequentialLR(optimizer, [before, after], milestones=[warmup])
    lrs = []
    for _ in range(total):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    return lrs


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_cosine_and_linear_are_those_of_torch(warmup: int) -> None:
    total = 300
    for name, after_warmup in (
        ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, total - warmup, eta_min=FLOOR)),
        ("linear", lambda o: lr_scheduler.LinearLR(o, 1.0, FLOOR / PEAK, total_iters=total - warmup)),
    ):
        schedule = make(name, PEAK, total, floor=FLOOR, warmup_start=START, warmup_steps=warmup)
        expected = lrs_of_torch(total, warmup, after_warmup)
        assert [schedule.lr(t) for t in range(total)] == pytest.approx(expected, rel=1e-9)


def test_step_and_constant_are_those_of_torch() -> None:
    total, milestones = 90, (30, 60, 80)
    step = make("step", PEAK, total, milestones=milestones, gamma=0.1)
    expected = lrs_of_torch(total, 0, lambda o: lr_scheduler.MultiStepLR(o, list(milestones), gamma=0.1))
    assert [step.lr(t) for t in range(total)] == pytest.approx(expected, rel=1e-9)
    constant = make("constant", PEAK, total, warmup_start=START, warmup_steps=20)
    expected = lrs_of_torch(total, 20, lambda o: lr_scheduler.ConstantLR(o, 1.0, 1))
    assert [constant.lr(t) for t in range(total)] == pytest.approx(expected, rel=1e-9)


def test_the_published_recipe() -> None:
    """300 epochs of ImageNet at batch 512, 20 of them warmup, timm's formula written out."""
    per_epoch = 2503
    total, warmup = 300 * per_epoch, 20 * per_epoch
    schedule = make("cosine", PEAK, total, floor=FLOOR, warmup_start=START, warmup_steps=warmup)
    assert schedule.lr(0) == START
    assert schedule.lr(10 * per_epoch) == pytest.approx((START + PEAK) / 2, rel=1e-12)
    assert schedule.lr(warmup) == PEAK
    assert schedule.lr(160 * per_epoch) == pytest.approx((PEAK + FLOOR) / 2, rel=1e-12)
    assert schedule.lr(total - 1) == pytest.approx(FLOOR, rel=1e-6)
    assert schedule.lr(total) == FLOOR == schedule.lr(total + 10**6)


def test_step_never_falls_below_the_floor() -> None:
    schedule = make("step", 1.0, 10, floor=0.05, milestones=(2, 4), gamma=0.1)
    assert [schedule.lr(t) for t in (1, 2, 3, 4, 9)] == pytest.approx([1.0, 0.1, 0.1, 0.05, 0.05])


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(1, 400))
    warmup = draw(st.integers(0, total))
    name = draw(st.sampled_from(["cosine", "linear", "constant", "step"] if warmup < total else ["cosine", "linear"]))
    marks = draw(st.lists(st.integers(warmup + 1, total), min_size=1, max_size=3)) if name == "step" else []
    return make(
        name,
        1.0,
        total,
        floor=draw(st.floats(0, 1)),
        warmup_start=draw(st.floats(0, 1)),
        warmup_steps=warmup,
        milestones=tuple(sorted(marks)),
        gamma=draw(st.floats(0.1, 1)),
    )


@settings(derandomize=True, deadline=None)
@given(schedules())
def test_properties(schedule: Schedule) -> None:
    """Rise in the warmup, fall after it, stay between floor (or start) and peak, and jump at milestones only."""
    lrs = [schedule.lr(t) for t in range(schedule.total_steps + 1)]
    lowest = min(schedule.floor, schedule.warmup_start)
    assert all(math.isfinite(lr) and lowest - 1e-12 <= lr <= 1.0 + 1e-12 for lr in lrs)
    warmup = schedule.warmup_steps
    assert all(late >= early - 1e-12 for early, late in pairwise(lrs[: warmup + 1]))
    assert all(late <= early + 1e-12 for early, late in pairwise(lrs[warmup:]))
    steepest = max(1 / max(warmup, 1), math.pi / 2 / max(schedule.total_steps - warmup, 1))
    if schedule.name != "step":
        assert all(abs(late - early) <= steepest + 1e-12 for early, late in pairwise(lrs))
    if schedule.name in ("cosine", "linear") and warmup < schedule.total_steps:
        assert lrs[-1] == pytest.approx(schedule.floor, abs=1e-12)


def test_describe() -> None:
    schedule = make("cosine", PEAK, 300, floor=FLOOR, warmup_start=START, warmup_steps=20)
    assert schedule.describe() == "cosine 0.0009 -> 5e-06 over 300 steps, 20 of warmup from 9e-07"
    assert make("constant", 0.1, 10).describe() == "constant 0.1 over 10 steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak": 0.0}, "above 0"),
        ({"peak": math.inf}, "above 0"),
        ({"floor": 2.0}, "between 0 and the peak"),
        ({"warmup_start": 1.5}, "between 0 and the peak"),
        ({"total_steps": 0}, "at least 1"),
        ({"warmup_steps": 101}, "longer than the run"),
        ({"milestones": (50, 49)}, "must be in ascending order"),
        ({"milestones": (50, 101)}, "must be after the warmup"),
        ({"milestones": (10,), "warmup_steps": 10}, "must be after the warmup"),
    ],
)
def test_lrs_and_lengths_that_contradict_each_other(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**{"name": "step", "peak": 1.0, "total_steps": 100, **change})
