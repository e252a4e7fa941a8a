"""Tests of the difference between two models, on the same images and over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
"""Samples of a bootstrap; hits, which are drawn faster, use ten times as many."""
ROUNDING = 1e-9
"""Results of seeds, in percent or nats, that differ by less are equal: they say nothing about the noise."""


@dataclass(frozen=True)
class Interval:
    """A difference with its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Return whether the whole interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Return how many images only the first and only the second model classifies correctly, and McNemar's exact p.

    Args:
        first, second: whether each model is right, for the same images in the same order.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    discordant = only_first + only_second
    p = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return only_first, only_second, p


def image_interval(differences: NDArray[np.float64], level: float, seed: int = 0) -> Interval:
    """Return the mean of paired differences with its bootstrap percentile interval over the images.

    For hits, two images are added, one with the largest difference in each direction (Bonett and Price, 2012).
    Otherwise, five images that only one model classifies correctly would be enough for an interval without zero.

    Args:
        differences: one per image.
        level: of confidence, such as 0.95.
        seed: of the resampling, so that the same files give the same numbers.
    """
    generator = np.random.default_rng(seed)
    mean = float(differences.mean())
    if not differences.any():
        return Interval(mean, mean, mean)
    # Resampling images equals drawing how often each one occurs. Equal differences are drawn together.
    values, counts = np.unique(differences, return_counts=True)
    if len(values) <= 64:  # hits of a few seeds
        largest = np.abs(values).max()
        values, counts = np.append(values, [largest, -largest]), np.append(counts, [1, 1])
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), size=10 * RESAMPLES)
        means = drawn @ values / counts.sum()
    else:
        means = np.array([generator.choice(differences, len(differences)).mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def paired_p(differences: Sequence[float]) -> float | None:
    """Return the p of the paired t-test over the differences of at least two seeds, or None if these are equal."""
    if np.ptp(differences) < ROUNDING:
        return None
    return float(stats.ttest_1samp(np.asarray(differences, dtype=np.float64), 0.0).pvalue)


def seed_interval(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Sequence[float]], level: float
) -> tuple[Interval, float] | None:
    """Return the difference of two means with its t interval and p, or None if no group has two different results.

    The noise between seeds is estimated from all groups together (pooled variance), because two or three seeds of one
    group say little about it. It is assumed to be the same in all groups.

    Args:
        first, second: the results of two groups, one per seed; at least one each.
        groups: the results of all groups.
        level: of confidence.
    """
    if all(np.ptp(values) < ROUNDING for values in groups if values):
        return None
    freedom = sum(len(values) - 1 for values in groups if values)
    squares = sum(float(np.var(values)) * len(values) for values in groups if values)
    error = float(np.sqrt(squares / freedom * (1 / len(first) + 1 / len(second))))
    mean = float(np.mean(first) - np.mean(second))
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    return Interval(mean, mean - half, mean + half), float(2 * stats.t.sf(abs(mean) / error, freedom))
