"""From a configuration to objects: what is checked early, and what the knobs arrive as."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_train.build import build_plan, build_run, build_schedule, build_source, build_transform, check_config, resolve
from moa_train.data import Order, TrainLoader
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopSignals


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("schedule.duration", "10", ["unit is missing", "'300 epochs'"]),
        ("schedule.duration", "10 epoks", ["'epochs'"]),
        ("schedule.duration", "0 steps", ["more than zero"]),
        ("schedule.duration", "ten epochs", ["not a duration"]),
        ("schedule.warmup", "200%", ["more than the whole training"]),
        ("schedule.warmup", "1.5 steps", ["steps are whole", "'2 steps'"]),
        ("schedule.milestones", "[50]", ["unit is missing"]),
        ("augment.off", "banana", ["not a duration"]),
        ("engine.eval_every", "-1 step", ["not a duration"]),
        ("engine.save_every", "often", ["not a duration"]),
        ("engine.keep_every", "1 week", ["not a duration"]),
        ("engine.stop_after", "5", ["unit is missing"]),
        ("model.depths", "[1,1,1]", ["depths", "heads"]),
        ("model.embed_dim", "33", ["33 channels"]),
        ("model.heads", "[3,2]", ["heads"]),
    ],
)
def test_what_needs_no_data_is_checked_before_it_is_opened(tiny, tmp_path, key, value, fragments):
    config = tiny({"data.name": "folder", "data.root": tmp_path / "nowhere", key: value, "data.val_fraction": 0.1})
    with pytest.raises(UserError) as error, Distributed.start("cpu") as alone:
        build_run(config, run_dir=tmp_path, distributed=alone, stop=StopSignals())
    assert "nowhere" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)
    if "." in key and not key.startswith(("model", "data")):
        assert key in str(error.value)


def test_the_defaults_pass(tiny):
    check_config(tiny())


def test_the_parts_of_a_limit_are_evenly_spaced(tiny):
    whole, part = (build_source(tiny({"data.limit": limit}).data, "train") for limit in ("null", 50))
    assert len(part) == 50
    labels = whole.labels[np.linspace(0, len(whole) - 1, 50).astype(int)]
    assert part.labels.tolist() == labels.tolist()
    assert set(part.labels.tolist()) == set(range(10))
    assert part.fingerprint != whole.fingerprint
    assert len(build_source(tiny({"data.limit": 50}).data, "test")) == 359  # the others are whole
    assert len(build_source(tiny({"data.limit": 10**6}).data, "train")) == len(whole)


def test_the_rate_follows_the_batch(tiny):
    changes = {"optim.lr": 0.1, "optim.lr_batch": 64, "optim.lr_scaling": "linear", "engine.batch_size": 32}
    schedule, distance = build_schedule(tiny(changes), 100)
    assert schedule.peak == pytest.approx(0.05)
    assert (schedule.total_steps, schedule.warmup_steps) == (12, 2)
    assert distance("1 epoch", "x") == Fraction(100, 32)
    assert distance("50%", "x") == 6
    assert distance(None, "x") == 0
    changes["optim.lr_scaling"] = "sqrt"
    assert build_schedule(tiny(changes), 100)[0].peak == pytest.approx(0.1 * 0.5**0.5)


@pytest.mark.parametrize(("stop", "step"), [("null", 12), ("5 steps", 5), ("1 epoch", 4), ("100 epochs", 12)])
def test_a_session_ends_where_it_is_asked_to(tiny, stop, step):
    config = tiny({"engine.stop_after": stop})
    schedule, distance = build_schedule(config, 100)
    plan = build_plan(config, schedule.total_steps, 100, distance)
    assert (plan.total_steps, plan.stop_step) == (12, step)


def test_a_batch_that_ranks_cannot_share_names_the_nearest(tiny):
    three = Distributed(0, 0, 3, 3, torch.device("cpu"))
    with pytest.raises(UserError, match=r"engine\.batch_size=32 cannot be shared by 3 ranks\. Nearest: 33"):
        resolve(tiny(), three)
    assert resolve(tiny({"engine.batch_size": 33}), three).engine.micro_batch_size == 11


def test_augmentation_ends_where_it_is_switched_off(tiny):
    config = tiny({"augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.erasing": 1.0, "augment.crop": "none"})
    config.augment.flip = config.augment.label_smoothing = 0.0
    source = build_source(config.data, "train")
    loader = TrainLoader(source, order=Order(len(source), 32, 0), micro_batch_size=32)
    transform = build_transform(config, source, off_step=1)
    batches = loader.batches()
    _, mixed = transform(next(batches), 0)
    assert ((mixed > 0).sum(dim=1) == 2).any()
    batch = next(batches)
    images, targets = transform(batch, 1)
    assert targets.argmax(1).tolist() == batch.labels.tolist()
    assert set(targets.unique().tolist()) == {0.0, 1.0}
    assert images.flatten(1).unique(dim=0).shape[0] == 32
    mean, std = (torch.tensor(values)[:, None, None] for values in _statistics())
    torch.testing.assert_close(images, (batch.images / 255 - mean) / std, rtol=1e-4, atol=1e-4)  # as they are


def _statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
    from moa_train.data import STATISTICS

    return STATISTICS["digits"].mean, STATISTICS["digits"].std


def test_channels_last_is_the_layout_of_images(tiny):
    config = tiny({"runtime.channels_last": "true"})
    source = build_source(config.data, "train")
    loader = TrainLoader(source, order=Order(len(source), 32, 0), micro_batch_size=32)
    images, _ = build_transform(config, source, off_step=1)(next(loader.batches()), 0)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_no_split_to_choose_by(tiny, tmp_path: Path):
    config = tiny({"data.val_fraction": "0"})
    with Distributed.start("cpu") as alone:
        run = build_run(config, run_dir=tmp_path, distributed=alone, stop=StopSignals())
    run.trainer.tracker.close()
    assert run.trainer.evaluate is None
    assert (run.trainer.eval_split, run.final_split) == ("none", "test")
