"""Accumulation, by a real model in float64; what one process and two gloo ranks did is in two_ranks.py."""

import json
from collections.abc import Iterator
from functools import partial
from itertools import count, islice

import pytest
import torch

from moa_train.data import Batch
from moa_train.engine.step import TrainStep
from moa_train.model import create_model
from moa_train.optim import clip_gradients, create_optimizer
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision


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


def a_step(device: torch.device) -> tuple[TrainStep, Iterator[Batch]]:
    """A step of a MOA-Transformer with all that is random in it, and its batches, which are there already."""
    fields = {"patch_size": 4, "embed_dim": 32, "depths": (2, 2), "heads": (1, 2), "window": 4}
    model = create_model("moa", image_size=(32, 32), num_classes=10, drop_path=0.5, dropout=0.1, **fields).to(device)
    numbers = torch.arange(8)
    batches = (
        Batch(torch.zeros(8, 3, 32, 32), numbers, numbers, numbers, numbers, step, 0).to(device) for step in count()
    )
    step = TrainStep(
        model,
        create_optimizer("adamw", model, lr=1e-3),
        transform=lambda batch, step: (batch.images, batch.images.new_full((8, 10), 0.1)),
        clip=partial(clip_gradients, mode="norm", limit=1.0),
        precision=Precision("fp32", device, torch.amp.GradScaler(device.type, enabled=False)),
        ema=None,
        micro_batches=1,
        batch_size=8,
        seed=0,
        distributed=Distributed(0, 0, 1, 1, device),
    )
    return step, batches


def test_the_host_waits_for_nothing_in_a_pass():
    """The device ``meta`` computes nothing: whatever the host would have to read from it is an error."""
    step, batches = a_step(torch.device("meta"))
    for batch in islice(batches, 3):
        loss, _ = step._loss(step.model, batch, batch.step)
        loss.backward()
        assert step.clip(step.parameters).is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_for_nothing_in_a_step_on_a_gpu():
    step, batches = a_step(torch.device("cuda", torch.cuda.current_device()))
    for number in range(10):
        # The first update is read, and kernels are loaded; later ones are looked at two steps behind.
        torch.cuda.set_sync_debug_mode("error" if number > 3 else "default")
        try:
            assert step(batches, number)["loss"].is_cuda
        finally:
            torch.cuda.set_sync_debug_mode("default")
