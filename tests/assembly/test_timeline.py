"""Durations in the configuration are converted to steps."""

from fractions import Fraction

import pytest

from moa_train.assembly.timeline import build_plan, build_schedule


def test_the_lr_follows_the_batch_size(tiny):
    changes = {"optim.lr": 0.1, "optim.lr_batch": 64, "optim.lr_scaling": "linear", "engine.batch_size": 32}
    schedule, to_steps = build_schedule(tiny(changes), 100)
    assert schedule.peak == pytest.approx(0.05)
    assert (schedule.total_steps, schedule.warmup_steps) == (12, 2)
    assert (schedule.floor, schedule.warmup_start) == (pytest.approx(5e-6 / 2), pytest.approx(9e-7 / 2))
    marks = build_schedule(tiny({"schedule.name": "step", "schedule.milestones": "['50%','9 steps']"}), 100)[0]
    assert marks.milestones == (6, 9)
    assert to_steps("1 epoch", "x") == Fraction(100, 32)
    assert to_steps("50%", "x") == 6
    assert to_steps(None, "x") == 0
    changes["optim.lr_scaling"] = "sqrt"
    assert build_schedule(tiny(changes), 100)[0].peak == pytest.approx(0.1 * 0.5**0.5)


@pytest.mark.parametrize(("stop", "step"), [("null", 12), ("5 steps", 5), ("1 epoch", 4), ("100 epochs", 12)])
def test_a_session_ends_at_stop_after(tiny, stop, step):
    config = tiny({"engine.stop_after": stop})
    schedule, to_steps = build_schedule(config, 100)
    plan = build_plan(config, schedule.total_steps, 100, to_steps)
    assert (plan.total_steps, plan.stop_step) == (12, step)
