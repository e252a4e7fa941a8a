"""Learning rates for another batch size than the one they were found with."""

import math

from moa_train.runtime.errors import UserError, choose

RULES = ("linear", "sqrt", "none")


def scale_rate(base: float, batch_size: int, reference: int = 512, rule: str = "linear") -> float:
    """Scale a rate that was found at ``reference`` samples a step to ``batch_size`` samples a step.

    ``linear`` multiplies by batch_size / reference (Goyal et al. 2017, the published recipe), ``sqrt`` by its
    root (the usual choice for Adam; Malladi et al. 2022), ``none`` by 1. ``batch_size`` counts all ranks
    and accumulated micro-batches. Peak, warm-up start and floor are to be scaled alike.
    """
    return base * _factor(batch_size, reference, rule)


def explain_rate(base: float, batch_size: int, reference: int = 512, rule: str = "linear") -> str:
    """Say in one line how the rate came about, such as ``0.0009 x 128/512 (linear) = 0.000225``."""
    rate = scale_rate(base, batch_size, reference, rule)
    if rule == "none":
        return f"{rate:.4g} (not scaled with the batch of {batch_size})"
    ratio = f"{batch_size}/{reference}"
    return f"{base:.4g} x {ratio if rule == 'linear' else f'sqrt({ratio})'} ({rule}) = {rate:.4g}"


def _factor(batch_size: int, reference: int, rule: str) -> float:
    if rule not in RULES:
        raise UserError(choose("optim.lr_scaling", rule, RULES))
    if batch_size < 1 or reference < 1:
        raise UserError(f"Batch {batch_size} and reference batch {reference} must both be at least 1.")
    ratio = batch_size / reference
    return {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]
