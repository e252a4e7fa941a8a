"""Calibration: known temperatures are found, and no image is reported with a temperature fitted on it."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from moa_train.report.calibration import BINS, Calibration, fit_temperature, halves, reliability


def drawn(count: int, temperature: float, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are calibrated if they are divided by the temperature."""
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 2, (count, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (probabilities.cumsum(1) > generator.random((count, 1))).argmax(1)
    return (temperature * logits).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_distorted_the_logits_is_found(temperature):
    logits, labels = drawn(20_000, temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    values, targets = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    best = cross_entropy(values / found, targets)
    assert all(best <= cross_entropy(values / (found * factor), targets) for factor in (0.98, 1.02))


def test_scaling_repairs_overconfidence():
    logits, labels = drawn(20_000, 3.0)
    found = Calibration.of(logits, labels)
    assert found.before.error.low > 5
    assert found.after.error.value < 1.5
    assert found.after.loss < found.before.loss
    assert found.after.error.low <= found.after.error.value <= found.after.error.high


def test_the_temperature_of_a_half_is_fitted_on_the_other():
    """Every third label of the first half is changed: only the temperature of the other half must see that."""
    logits, labels = drawn(4000, 1.0)
    first = halves(len(labels))
    changed = np.where(first & (np.arange(len(labels)) % 3 == 0), (labels + 1) % 5, labels)
    before, after = Calibration.of(logits, labels), Calibration.of(logits, changed)
    assert after.temperatures[0] == before.temperatures[0]
    assert after.temperatures[1] > 2 * before.temperatures[1]


def test_the_error_agrees_with_a_loop_over_bins_and_empty_bins_are_null():
    logits, labels = drawn(500, 2.0)
    log_probabilities = torch.from_numpy(logits).double().log_softmax(1).numpy()
    confidence, hits = np.exp(log_probabilities.max(1)), log_probabilities.argmax(1) == labels
    expected = 0.0
    for place in range(BINS):
        inside = (confidence >= place / BINS) & (confidence < (place + 1) / BINS)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - hits[inside].mean())
    found = reliability(log_probabilities, labels)
    assert found.error.value == pytest.approx(100 * expected)
    bins = found.as_dict()["bins"]
    assert bins[0] == {"from": 0.0, "to": 100 / BINS, "images": 0, "confidence": None, "accuracy": None}
    assert sum(one["images"] for one in bins) == 500


def test_few_images_get_no_temperature():
    assert Calibration.of(*drawn(40, 1.0)).after is None


def test_a_half_without_mistakes_gets_no_temperature():
    """Its loss has no minimum: the lower the temperature, the lower the loss."""
    logits, labels = drawn(4000, 1.0)
    first = halves(len(labels))
    labels = np.where(first, logits.argmax(1), labels)
    assert fit_temperature(logits[first], labels[first]) is None
    assert fit_temperature(logits[~first], labels[~first]) == pytest.approx(1, rel=0.1)
    found = Calibration.of(logits, labels)
    assert (found.after, found.temperatures) == (None, [])


def test_masked_classes_do_not_change_the_temperature():
    logits, labels = drawn(4000, 3.0)
    masked = np.pad(logits, ((0, 0), (0, 1)), constant_values=-np.inf)
    assert fit_temperature(masked, labels) == pytest.approx(fit_temperature(logits, labels))
    assert Calibration.of(masked, labels).after.loss == pytest.approx(Calibration.of(logits, labels).after.loss)
