from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_train.engine.plan import Interval, Plan


@pytest.mark.parametrize("interval", [Fraction(1), Fraction(3), Fraction(25, 8), Fraction(7, 2), Fraction(1, 3)])
def test_due_at_the_first_step_at_or_after_each_multiple(interval):
    multiples = [k * interval for k in range(1, 1000)]
    expected = {next(step for step in range(10_000) if step >= multiple) for multiple in multiples if multiple <= 200}
    assert {step for step in range(1, 201) if Interval(interval).due(step)} == expected


@given(st.fractions(min_value=Fraction(1, 50), max_value=500, max_denominator=1000), st.integers(1, 10**6))
def test_due_iff_a_multiple_lies_within_the_step(interval, step):
    covered = any(step - 1 < k * interval <= step for k in (step // interval, step // interval + 1) if k)
    assert Interval(interval).due(step) == covered


def test_zero_is_never():
    assert not any(Interval(Fraction(0)).due(step) for step in range(1, 1000))


def plan(**changes) -> Plan:
    every = Interval(Fraction(10))
    fields = dict.fromkeys(("log", "evaluate", "save", "keep"), every)
    return Plan(**{"total_steps": 25, "steps_per_epoch": Fraction(7, 2), "stop_step": 23, **fields, **changes})


def test_saves_at_every_interval_and_at_the_end_of_the_session():
    found = plan(save=Interval(Fraction(10)), keep=Interval(Fraction(15, 2)))
    assert [step for step in range(1, 24) if found.saves(step)] == [8, 10, 15, 20, 23]
    assert [
        step for step in range(1, 24) if plan(save=Interval(Fraction(0)), keep=Interval(Fraction(0))).saves(step)
    ] == [23]


@pytest.mark.parametrize("stop_step", [0, 26])
def test_a_session_ends_within_the_run(stop_step):
    with pytest.raises(AssertionError):
        plan(stop_step=stop_step)
