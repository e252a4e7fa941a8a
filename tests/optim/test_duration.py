from fractions import Fraction

import pytest

from moa_train.optim.duration import FORMS, Duration
from moa_train.runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("300 epochs", "epochs", 300),
        ("300ep", "epochs", 300),
        ("1 epoch", "epochs", 1),
        ("0.5 epochs", "epochs", Fraction(1, 2)),
        ("500 steps", "steps", 500),
        ("5e2 steps", "steps", 500),
        ("500step", "steps", 500),
        ("1e6 examples", "examples", 1_000_000),
        ("1_000_000 examples", "examples", 1_000_000),
        ("1.5e3ex", "examples", 1500),
        ("5%", "percent", 5),
        ("12.5 %", "percent", Fraction(25, 2)),
        (" 5 Percent ", "percent", 5),
        (".5%", "percent", Fraction(1, 2)),
        ("0", "steps", 0),
        (0, "steps", 0),
        ("0 epochs", "epochs", 0),
    ],
)
def test_forms(text: str, unit: str, amount: Fraction) -> None:
    assert Duration.parse(text) == Duration(Fraction(amount), unit)


@pytest.mark.parametrize(
    "text",
    [
        "", "epochs", "300", 300, 1.5, "nan", "nan epochs", "inf steps", float("nan"), float("inf"), "-5 epochs",
        "-0 steps", "5 epochs 3 steps", "5 epochs, 500 steps", "5%%", "5 weeks", "1e999999999 steps", "1e400ex",
        "9" * 40 + "ep", "1/2 epochs", "0x10 steps", "1e epochs", None, True, "١ epochs", "5 epohcs", "1.5.2 ep",
        "[5 epochs]",
    ],
)  # fmt: skip
def test_other_texts_are_refused_with_the_allowed_forms(text: object) -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup=") as error:
        Duration.parse(text, what="schedule.warmup")  # type: ignore[arg-type]
    assert FORMS in str(error.value)


def test_messages_help() -> None:
    with pytest.raises(UserError, match="Did you mean 'epochs'"):
        Duration.parse("5 epohcs")
    with pytest.raises(UserError, match="unit is missing"):
        Duration.parse("300")
    with pytest.raises(UserError, match="Write '3 steps'"):
        Duration.parse("2.5 steps")
    with pytest.raises(UserError, match="at most '100%'"):
        Duration.parse("101%")
    with pytest.raises(UserError, match="more than zero"):
        Duration.parse("0 epochs", allow_zero=False)


def test_epochs_and_examples_are_rounded_up() -> None:
    assert Duration.parse("300 epochs").steps(512, 1_281_167) == 750_684  # 750,683.8
    assert Duration.parse("1 epoch").steps(64, 128) == 2
    assert Duration.parse("1 epoch").steps(64, 129) == 3
    assert Duration.parse("1e6 examples").steps(512, 7) == 1954
    assert Duration.parse("1 example").steps(512, 7) == 1
    assert Duration.parse("0 epochs").steps(512, 7) == 0
    assert Duration.parse("7 steps").steps(512, 7) == 7


def test_decimal_amounts_are_exact() -> None:
    # In floats 0.07 * 100 = 7.000000000000001, which would be rounded up to 8.
    assert Duration.parse("0.07 epochs").steps(1, 100) == 7
    assert Duration.parse("7%").steps(1, 1, total_steps=100) == 7
    assert Duration.parse("1 epoch").exact_steps(128, 50_000) == Fraction(3125, 8)


def test_percent_needs_a_total() -> None:
    assert Duration.parse("5%").steps(512, 7, total_steps=1001) == 51
    assert Duration.parse("100%").steps(512, 7, total_steps=1001) == 1001
    with pytest.raises(UserError, match="cannot be a percentage"):
        Duration.parse("5%").steps(512, 7)


@pytest.mark.parametrize("text", ["300 epochs", "5%", "12.5%", "1e+06 examples", "500 steps"])
def test_text_can_be_parsed_again(text: str) -> None:
    duration = Duration.parse(text)
    assert Duration.parse(str(duration)) == duration
