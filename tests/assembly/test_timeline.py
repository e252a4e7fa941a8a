"""Durations become steps."""

from fractions import Fraction

import pytest

from moa_train.assembly.timeline import build_plan, build_schedule


def test_the_rate_follows_the_batch(tiny):
    changes = {"optim.lr": 0.1, "optim.lr_batch": 64, "optim.lr_scaling": "linear", "engine.batch_size": 32}
    schedule, distance = build_schedule(tiny(changes), 100)
    assert schedule.peak == pytest.approx(0.05)
    assert (schedule.total_steps, schedule.warmup_steps) == (12, 2)
    assert distance("1 epoch", "x") == Fraction(100, 32)
    assert distance("50%", "x") == 6
    assert distance(None, "x") == 0
    changes["optim.lr_scaling"] = "sqrt"
    assert build_schedule(tiny(changes), 100)[0].peak == pytest.approx(0.1 * 0.5**0.5)


@pytest.mark.parametrize(("stop", "step"), [("null", 12), ("5 steps", 5), ("1 epoch", 4), ("100 epochs", 12)])
def test_a_session_ends_where_it_is_asked_to(tiny, stop, step):
    config = tiny({"engine.stop_after": stop})
    schedule, distance = build_schedule(config, 100)
    plan = build_plan(config, schedule.total_steps, 100, distance)
    assert (plan.total_steps, plan.stop_step) == (12, step)
