import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from moa_train.optim.schedule import KINDS, Schedule
from moa_train.runtime.errors import UserError

PEAK, FLOOR, START = 9e-4, 5e-6, 9e-7


def rates_of_torch(total: int, warmup: int, make: Any, start: float = START) -> list[float]:
    """Drive torch's own scheduler: a linear warm-up, then what ``make`` returns."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    after = make(optimizer)
    if warmup:
        before = lr_scheduler.LinearLR(optimizer, start / PEAK, 1.0, total_iters=warmup)
        after = lr_scheduler.SequentialLR(optimizer, [before, after], milestones=[warmup])
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_cosine_and_linear_are_torchs(warmup: int) -> None:
    total = 300
    for kind, make in (
        ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, total - warmup, eta_min=FLOOR)),
        ("linear", lambda o: lr_scheduler.LinearLR(o, 1.0, FLOOR / PEAK, total_iters=total - warmup)),
    ):
        schedule = Schedule(kind, PEAK, total, floor=FLOOR, warmup_start=START, warmup_steps=warmup)
        expected = rates_of_torch(total, warmup, make)
        assert [schedule.rate(t) for t in range(total)] == pytest.approx(expected, rel=1e-9)


def test_step_and_constant_are_torchs() -> None:
    total, milestones = 90, (30, 60, 80)
    step = Schedule("step", PEAK, total, milestones=milestones, gamma=0.1)
    expected = rates_of_torch(total, 0, lambda o: lr_scheduler.MultiStepLR(o, list(milestones), gamma=0.1))
    assert [step.rate(t) for t in range(total)] == pytest.approx(expected, rel=1e-9)
    constant = Schedule("constant", PEAK, total, warmup_start=START, warmup_steps=20)
    expected = rates_of_torch(total, 20, lambda o: lr_scheduler.ConstantLR(o, 1.0, 1))
    assert [constant.rate(t) for t in range(total)] == pytest.approx(expected, rel=1e-9)


def test_the_published_recipe() -> None:
    """300 epochs of ImageNet at batch 512, 20 of them warm-up, timm's formula written out."""
    per_epoch = 2503
    total, warmup = 300 * per_epoch, 20 * per_epoch
    schedule = Schedule("cosine", PEAK, total, floor=FLOOR, warmup_start=START, warmup_steps=warmup)
    assert schedule.rate(0) == START
    assert schedule.rate(10 * per_epoch) == pytest.approx((START + PEAK) / 2, rel=1e-12)
    assert schedule.rate(warmup) == PEAK
    assert schedule.rate(160 * per_epoch) == pytest.approx((PEAK + FLOOR) / 2, rel=1e-12)
    assert schedule.rate(total - 1) == pytest.approx(FLOOR, rel=1e-6)
    assert schedule.rate(total) == FLOOR == schedule.rate(total + 10**6)


def test_constant_with_cooldown_is_a_trapezoid() -> None:
    schedule = Schedule("constant", 1.0, 100, floor=0.1, warmup_steps=10, cooldown_steps=20)
    assert [schedule.rate(t) for t in (0, 5, 10, 50, 80)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert schedule.rate(90) == pytest.approx(0.55)
    assert schedule.rate(99) == pytest.approx(0.145)
    assert schedule.rate(100) == pytest.approx(0.1)


def test_step_never_falls_below_the_floor() -> None:
    schedule = Schedule("step", 1.0, 10, floor=0.05, milestones=(2, 4), gamma=0.1)
    assert [schedule.rate(t) for t in (1, 2, 3, 4, 9)] == pytest.approx([1.0, 0.1, 0.1, 0.05, 0.05])


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(1, 400))
    warmup = draw(st.integers(0, total))
    cooldown = draw(st.integers(0, total - warmup))
    kind = draw(st.sampled_from(KINDS if warmup < total else KINDS[:2]))
    marks = draw(st.lists(st.integers(warmup + 1, total), min_size=1, max_size=3)) if kind == "step" else []
    floor, start = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    return Schedule(
        kind,
        1.0,
        total,
        floor=floor,
        warmup_start=start,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        milestones=tuple(sorted(marks)),
        gamma=draw(st.floats(0.1, 1)),
    )


@settings(derandomize=True, deadline=None)
@given(schedules())
def test_properties(schedule: Schedule) -> None:
    """Up in the warm-up, down after it, always between floor (or start) and peak, and no jump but at milestones."""
    rates = [schedule.rate(t) for t in range(schedule.total_steps + 1)]
    lowest = min(schedule.floor, schedule.warmup_start)
    assert all(math.isfinite(rate) and lowest - 1e-12 <= rate <= 1.0 + 1e-12 for rate in rates)
    warmup = schedule.warmup_steps
    assert all(late >= early - 1e-12 for early, late in pairwise(rates[: warmup + 1]))
    assert all(late <= early + 1e-12 for early, late in pairwise(rates[warmup:]))
    steepest = max(1 / max(warmup, 1), math.pi / 2 / max(schedule.total_steps - warmup, 1))
    steepest = max(steepest, 1 / max(schedule.cooldown_steps, 1) if schedule.cooldown_steps else 0)
    if schedule.kind != "step":
        assert all(abs(late - early) <= steepest + 1e-12 for early, late in pairwise(rates))
    if schedule.kind in ("cosine", "linear") and warmup < schedule.total_steps:
        assert rates[-1] == pytest.approx(schedule.floor, abs=1e-12)


def test_describe() -> None:
    schedule = Schedule("cosine", PEAK, 300, floor=FLOOR, warmup_start=START, warmup_steps=20)
    assert schedule.describe() == "cosine 0.0009 -> 5e-06 over 300 steps, 20 of warm-up from 9e-07"
    assert Schedule("constant", 0.1, 10).describe() == "constant 0.1 over 10 steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cosin"}, "Did you mean 'cosine'"),
        ({"peak": 0.0}, "above 0"),
        ({"peak": -1.0}, "above 0"),
        ({"peak": math.nan}, "above 0"),
        ({"peak": math.inf}, "above 0"),
        ({"floor": 2.0}, "between 0 and the peak"),
        ({"floor": -0.1}, "between 0 and the peak"),
        ({"floor": math.nan}, "between 0 and the peak"),
        ({"warmup_start": 1.5}, "between 0 and the peak"),
        ({"total_steps": 0}, "at least 1"),
        ({"warmup_steps": 101}, "longer than the training"),
        ({"warmup_steps": 60, "cooldown_steps": 41}, "longer than the training"),
        ({"warmup_steps": -1}, "negative"),
        ({"kind": "step"}, "needs milestones"),
        ({"kind": "step", "milestones": (50, 49)}, "must be in order"),
        ({"kind": "step", "milestones": (50, 101)}, "must lie after"),
        ({"kind": "step", "milestones": (10,), "warmup_steps": 10}, "must lie after"),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_mistakes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**{"kind": "cosine", "peak": 1.0, "total_steps": 100, **change})
