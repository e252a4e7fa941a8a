"""Accumulation, by a real model in float64; what one process and two gloo ranks did is in two_ranks.py."""

import json

import pytest


@pytest.fixture(scope="module", params=[(1, 0), (2, 0), (2, 1)], ids=["alone", "rank 0 of 2", "rank 1 of 2"])
def found(request: pytest.FixtureRequest, two_ranks) -> dict:
    world_size, rank = request.param
    return json.loads((two_ranks / f"engine-{world_size}-{rank}.json").read_text())["accumulate"]


def test_four_micro_batches_have_the_gradient_of_the_large_batch(found):
    assert found["gradient"] < 1e-10
    assert found["loss"] < 1e-6  # is only logged: added up in float32


def test_they_are_clipped_once_and_give_the_same_weights(found):
    assert found["clips"] == 1
    assert found["norm"] < 1e-12  # of the whole, before clipping
    assert found["weights"] < 1e-12
    assert found["left"] == []  # no gradient is carried over to the next update


def test_ranks_synchronise_at_the_last_micro_batch_only(found):
    begun = len(found["micro"])
    assert set(found["reduced"]) <= {begun}
    if begun == 4:
        assert found["elements"] == 0  # alone
    else:
        assert begun == 2
        assert found["elements"] == found["parameters"]  # every gradient once
