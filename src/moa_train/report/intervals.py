"""Confidence intervals at 95%."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""Quantile 0.975 of the standard normal distribution."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """Return the interval as JSON."""
        return {name: finite(value) for name, value in asdict(self).items()}


def finite(value: float) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity: None in their place."""
    return value if math.isfinite(value) else None


def share(hits: int, total: int) -> Interval:
    """Return a percentage with its Wilson score interval (Wilson, 1927), which holds for small and extreme counts."""
    if not total:
        return Interval(0.0, 0.0, 100.0)
    rate, scale = hits / total, 1 + Z**2 / total
    center = (rate + Z**2 / (2 * total)) / scale
    margin = Z / scale * np.sqrt(rate * (1 - rate) / total + Z**2 / (4 * total**2))
    low, high = (0.0 if hits == 0 else center - margin), (1.0 if hits == total else center + margin)
    return Interval(100 * rate, 100 * float(low), 100 * float(high))


def mean(values: NDArray[np.floating]) -> Interval:
    """Return the mean of one value per image with its normal interval."""
    center = float(values.mean(dtype=np.float64)) if len(values) else math.nan
    if not math.isfinite(center):
        return Interval(center, center, center)
    margin = Z * float(values.std(dtype=np.float64, ddof=1)) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(center, center - margin, center + margin)
