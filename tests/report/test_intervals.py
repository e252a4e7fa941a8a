"""Intervals agree with independent implementations and cover as often as they say."""

import numpy as np
import pytest
from scipy.stats import binomtest

from moa_train.report.intervals import mean, share


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (1, 3), (4520, 10000), (1, 1)])
def test_the_wilson_interval_agrees_with_scipy(hits, total):
    found = share(hits, total)
    expected = binomtest(hits, total).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert found.low <= found.value <= found.high


def test_no_images_allow_every_percentage():
    assert share(0, 0).as_dict() == {"value": 0.0, "low": 0.0, "high": 100.0}


def test_intervals_of_means_cover_the_true_mean():
    draws = np.random.default_rng(0).exponential(size=(1000, 400))
    covered = [found.low <= 1 <= found.high for found in map(mean, draws)]
    assert 0.92 < np.mean(covered) < 0.97
