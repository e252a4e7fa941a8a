"""Calibration: whether predictions with a confidence of 80% are right in 80% of the cases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq

from moa_train.data.counter import uniform
from moa_train.report.intervals import Interval, finite, share

BINS = 15
"""Number of equally wide bins of confidence."""
_REPLICATES = 250
_HALVES, _BOOTSTRAP = 1, 2  # purposes of random numbers
_LEAST = -1e30  # replaces minus infinity, whose product with a probability of 0 is not defined


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy, by bins of confidence.

    Attributes:
        counts: images in each bin, (BINS,).
        confidence: mean confidence in each bin, in percent; NaN in empty bins.
        accuracy: accuracy in each bin, in percent; NaN in empty bins.
        error: expected calibration error (ECE; Guo et al., arXiv 1706.04599) in percentage points.
        loss: mean cross-entropy.
    """

    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    error: Interval
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """Return the bins as JSON; values of empty bins are null."""
        rows = [
            {
                "from": 100 * place / BINS,
                "to": 100 * (place + 1) / BINS,
                "images": int(count),
                "confidence": float(self.confidence[place]) if count else None,
                "accuracy": share(round(self.accuracy[place] * count / 100), int(count)).as_dict() if count else None,
            }
            for place, count in enumerate(self.counts)
        ]
        return {"ece": self.error.as_dict(), "loss": finite(self.loss), "bins": rows}


def reliability(log_probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> Reliability:
    """Return the reliability of predictions.

    Args:
        log_probabilities: (N, K).
        labels: (N,).
    """
    confidence = np.exp(log_probabilities.max(1))
    hits = (log_probabilities.argmax(1) == labels).astype(np.float64)
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    counts, sums, right = (np.bincount(place, weights, BINS) for weights in (None, confidence, hits))
    with np.errstate(invalid="ignore"):
        centers, accuracy = 100 * sums / counts, 100 * right / counts
    chosen = -np.take_along_axis(log_probabilities, labels[:, None], 1)
    error = _error(sums - right, len(labels))
    return Reliability(
        counts.astype(np.int64),
        centers,
        accuracy,
        _with_interval(error, place, confidence - hits),
        float(chosen.mean()),
    )


def _error(gaps: NDArray[Any], total: int) -> float:
    return 100 * float(np.abs(gaps).sum()) / max(total, 1)


def _with_interval(error: float, place: NDArray[np.int64], gaps: NDArray[np.float64]) -> Interval:
    """Return the error with its basic bootstrap interval over images.

    The error is biased upward, because noise in a bin never cancels that of another one. Resampling adds the same bias
    again, so the interval is reflected at the estimate (Davison and Hinkley, 1997, section 5.2).
    """
    generator, total = np.random.default_rng(_BOOTSTRAP), len(place)
    errors = np.empty(_REPLICATES)
    for replicate in range(_REPLICATES):
        rows = generator.integers(0, total, total)
        errors[replicate] = _error(np.bincount(place[rows], gaps[rows], BINS), total)
    low, high = 2 * error - np.quantile(errors, [0.975, 0.025])
    return Interval(error, max(0.0, float(low)), max(error, float(high)))


def halves(count: int) -> NDArray[np.bool_]:
    """Return which of ``count`` images belong to the first half; the same for every model that is evaluated on them."""
    return uniform(_HALVES, np.arange(count)) < 0.5


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
    """Return the temperature that minimizes the cross-entropy of logits / temperature, to a thousandth.

    The loss is convex in 1 / temperature, so its derivative is zero only at the minimum. Between 1/20 and 20 there is
    none, for example, if all predictions are right: the lower the temperature, the lower the loss. The result is then
    None.

    Args:
        logits: (N, K).
        labels: (N,).
    """
    centered = np.maximum(logits - logits.max(1, keepdims=True), _LEAST)
    target = float(np.take_along_axis(centered, labels[:, None], 1).mean(dtype=np.float64))

    def slope(log_scale: float) -> float:
        weights = np.exp(np.float32(np.exp(log_scale)) * centered)
        means = np.einsum("nk,nk->n", weights, centered) / weights.sum(1)
        return float(means.mean(dtype=np.float64)) - target

    low, high = np.log(1 / 20), np.log(20.0)
    if not slope(low) < 0 < slope(high):
        return None
    return float(np.exp(-brentq(slope, low, high, xtol=1e-3)))


@dataclass(frozen=True)
class Calibration:
    """Reliability before and after temperature scaling.

    The temperature of each half of the images is fitted on the other half, so no image is reported with a temperature
    that was fitted on it.

    Attributes:
        before: with the model's own probabilities.
        after: with a temperature; None if a half has too few images or no minimum.
        temperatures: of the first and the second half, if both have one.
    """

    before: Reliability
    after: Reliability | None
    temperatures: Sequence[float]

    @classmethod
    def of(cls, logits: NDArray[np.float32], labels: NDArray[np.int64], least: int = 50) -> "Calibration":
        """Compute the calibration; halves with fewer than ``least`` images get no temperature."""
        values = torch.from_numpy(logits).double()
        before = reliability(values.log_softmax(1).numpy(), labels)
        first = halves(len(labels))
        if min(first.sum(), (~first).sum()) < least:
            return cls(before, None, [])
        one, other = (fit_temperature(logits[~part], labels[~part]) for part in (first, ~first))
        if one is None or other is None:
            return cls(before, None, [])
        scaled = values / torch.from_numpy(np.where(first, one, other))[:, None]
        return cls(before, reliability(scaled.log_softmax(1).numpy(), labels), [one, other])

    def as_dict(self) -> dict[str, Any]:
        """Return the calibration as JSON."""
        after = None if self.after is None else self.after.as_dict()
        return {"before": self.before.as_dict(), "after": after, "temperatures": list(self.temperatures)}
