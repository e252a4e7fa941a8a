"""Gradient accumulation with a real model in float64; two_ranks.py runs it in one process and on two gloo ranks."""

import json

import pytest


@pytest.fixture(scope="module", params=[(1, 0), (2, 0), (2, 1)], ids=["alone", "rank 0 of 2", "rank 1 of 2"])
def found(request: pytest.FixtureRequest, two_ranks) -> dict:
    world_size, rank = request.param
    return json.loads((two_ranks / f"engine-{world_size}-{rank}.json").read_text())["accumulate"]


def test_four_micro_batches_have_the_gradient_of_the_large_batch(found):
    assert found["gradient"] < 1e-10
    assert found["loss"] < 1e-6  # float32, because it is only logged


def test_they_are_clipped_once_and_give_the_same_weights(found):
    assert found["clips"] == 1
    assert found["norm"] < 1e-12  # of the whole gradient, before clipping
    assert found["weights"] < 1e-12
    assert found["left"] == []  # the next update starts without gradients


def test_ranks_synchronize_at_the_last_micro_batch_only(found):
    begun = len(found["micro"])
    assert set(found["reduced"]) <= {begun}
    if begun == 4:
        assert found["elements"] == 0  # one process
    else:
        assert begun == 2
        assert found["elements"] == found["parameters"]  # every gradient once
