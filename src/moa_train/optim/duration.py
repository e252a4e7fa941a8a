"""Durations in the configuration: a number of steps, epochs or examples, or a percentage of the run."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from moa_train.runtime.errors import UserError, nearest

FORMS = "'300 epochs' (or '300ep'), '500 steps', '1e6 examples', '5%'"

_UNITS = {
    "steps": ("steps", "step", "st"),
    "epochs": ("epochs", "epoch", "ep"),
    "examples": ("examples", "example", "ex"),
    "percent": ("percent", "%"),
}
_UNIT_OF = {spelling: unit for unit, spellings in _UNITS.items() for spelling in spellings}
# At most two digits of exponent: Fraction("1e999999999") would fill the memory.
_PATTERN = re.compile(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(e[+-]?\d{1,2})?\s*([a-z%]*)", re.ASCII)


@dataclass(frozen=True)
class Duration:
    """An amount of ``steps``, ``epochs``, ``examples`` or ``percent`` of the run.

    The amount is a fraction, not a float, so that ``'0.1 epochs'`` of 1,000 samples is exactly 100 samples.
    """

    amount: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str | float, *, what: str = "duration", allow_zero: bool = True) -> "Duration":
        """Parse ``text``, which has one of the forms in `FORMS`; zero needs no unit.

        Args:
            text: the duration.
            what: the setting, for error messages.
            allow_zero: whether zero is allowed.

        Raises:
            UserError: the text has another form, or a value that makes no sense.
        """
        match = _PATTERN.fullmatch(str(text).strip().lower().replace("_", ""))
        number, exponent, spelling = match.groups() if match else ("0", None, "?")
        amount = Fraction(number + (exponent or ""))
        unit = "steps" if amount == 0 and spelling == "" else _UNIT_OF.get(spelling)
        if unit is None:
            hint = nearest(spelling, [*_UNITS, "ep"]) if spelling else " The unit is missing."
            raise UserError(f"{what}={text} is not a duration.{hint} Write one of {FORMS}.")
        if amount == 0 and not allow_zero:
            raise UserError(f"{what}={text} must be more than zero, such as {FORMS}.")
        if unit == "steps" and amount.denominator != 1:
            raise UserError(f"{what}={text}: steps must be a whole number. Write '{math.ceil(amount)} steps'.")
        if unit == "percent" and amount > 100:
            raise UserError(f"{what}={text} is more than the whole run. Write at most '100%'.")
        return cls(amount, unit)

    def steps(self, batch_size: int, dataset_length: int, total_steps: int | None = None) -> int:
        """Convert to optimizer steps, rounded up; for the arguments see `exact_steps`."""
        return math.ceil(self.exact_steps(batch_size, dataset_length, total_steps))

    def exact_steps(self, batch_size: int, dataset_length: int, total_steps: int | None = None) -> Fraction:
        """Convert to optimizer steps, exactly: an epoch is not necessarily a whole number of steps.

        Args:
            batch_size: number of samples per optimizer step, over all ranks and accumulated micro-batches.
            dataset_length: number of samples per epoch, including repeats.
            total_steps: number of steps of the run; needed only for a percentage.
        """
        match self.unit:
            case "steps":
                return self.amount
            case "epochs":
                return self.amount * dataset_length / batch_size
            case "examples":
                return self.amount / batch_size
        if total_steps is None:
            raise UserError(f"schedule.duration={self}: the length of the run itself cannot be a percentage.")
        return self.amount * total_steps / 100

    def __str__(self) -> str:
        return f"{float(self.amount):.12g}" + ("%" if self.unit == "percent" else f" {self.unit}")
