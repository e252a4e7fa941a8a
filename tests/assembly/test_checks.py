"""Checks that happen before the data is opened."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from moa_train.assembly.checks import check_config, check_same_data, fill_micro_batch_size, training_record
from moa_train.assembly.run import build_run
from moa_train.data.dataset import open_split
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopSignals
from moa_train.schema import DataConfig


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("schedule.duration", "10", ["unit is missing", "'300 epochs'"]),
        ("schedule.duration", "10 epoks", ["'epochs'"]),
        ("schedule.duration", "0 steps", ["more than zero"]),
        ("schedule.duration", "ten epochs", ["not a duration"]),
        ("schedule.warmup", "200%", ["more than the whole run"]),
        ("schedule.warmup", "1.5 steps", ["must be a whole number", "'2 steps'"]),
        ("schedule.milestones", "[50]", ["unit is missing"]),
        ("augment.weak_for", "banana", ["not a duration"]),
        ("engine.eval_every", "-1 step", ["not a duration"]),
        ("engine.save_every", "often", ["not a duration"]),
        ("engine.keep_every", "1 week", ["not a duration"]),
        ("engine.stop_after", "5", ["unit is missing"]),
        ("model.depths", "[1,1,1]", ["depths", "heads"]),
        ("model.embed_dim", "33", ["33 channels"]),
        ("model.heads", "[3,2]", ["heads"]),
    ],
)
def test_errors_that_need_no_data_are_found_before_it_is_opened(tiny, tmp_path, key, value, fragments):
    config = tiny({"data.name": "folder", "data.root": tmp_path / "nowhere", key: value, "data.val_fraction": 0.1})
    with pytest.raises(UserError) as error, Distributed.start("cpu", 60.0) as alone:
        build_run(config, run_dir=tmp_path, distributed=alone, stop=StopSignals())
    assert "nowhere" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)
    if "." in key and not key.startswith(("model", "data")):
        assert key in str(error.value)


def test_the_defaults_pass(tiny):
    check_config(tiny())


def test_the_error_for_an_indivisible_batch_names_the_nearest_size(tiny):
    three = Distributed(torch.device("cpu"), world_size=3, local_world_size=3)
    with pytest.raises(UserError, match=r"engine\.batch_size=32 cannot be divided among 3 ranks\. Nearest: 33"):
        fill_micro_batch_size(tiny(), three)
    assert fill_micro_batch_size(tiny({"engine.batch_size": 33}), three).engine.micro_batch_size == 11
    with pytest.raises(UserError, match=r"Possible numbers of ranks: 1, 2, 4\. A new run can"):  # as on a resume
        fill_micro_batch_size(tiny({"engine.micro_batch_size": 8}), three)
    eight = Distributed(torch.device("cpu"), world_size=8, local_world_size=8)
    with pytest.raises(UserError, match=r"engine\.batch_size=4 cannot be divided among 8 ranks\. Nearest: 8\."):
        fill_micro_batch_size(tiny({"engine.batch_size": 4}), eight)


@pytest.mark.parametrize(
    ("images", "batch_size", "repeats", "fits"),
    [(100, 100, 1, True), (100, 101, 1, False), (34, 102, 3, True), (33, 100, 3, False), (1, 2, 1, False)],
)
def test_a_batch_is_not_larger_than_an_epoch(tiny, tmp_path, images, batch_size, repeats, fits):
    changes = {"data.limit": images, "engine.batch_size": batch_size, "augment.repeats": repeats}
    config = tiny(changes)
    error = contextlib.nullcontext() if fits else pytest.raises(UserError)
    with error as raised, Distributed.start("cpu", 60.0) as alone:
        build_run(config, run_dir=tmp_path, distributed=alone, stop=StopSignals()).trainer.tracker.close()
    if not fits:
        said = str(raised.value)
        most, good = map(int, re.findall(r"largest size is engine\.batch_size=(\d+); .* use (\d+)\.", said)[0])
        assert 1 <= good <= most == images * repeats < batch_size
        assert f"engine.batch_size={batch_size}, but there are only {images} training images" in said


def test_training_files_are_compared_without_those_that_are_held_out(make_classes):
    root = make_classes(2)
    shutil.rmtree(root / "val")
    config = DataConfig(name="folder", root=str(root), val_fraction=0.3, hold_out="name")
    before, held = training_record(open_split(config, "train")), open_split(config, "val")
    of_an_earlier_version = {name: value for name, value in before.items() if name != "names"}
    check_same_data(of_an_earlier_version, before)
    Path(held.name(0)).unlink()
    now = training_record(open_split(config, "train"))
    check_same_data(before, now)
    with pytest.raises(UserError, match="The training images are not those of the checkpoint"):
        check_same_data(of_an_earlier_version, now)
    Path(open_split(config, "train").name(0)).unlink()
    with pytest.raises(UserError, match=r"added, removed, renamed or relabeled \(class0: \d+ -> \d+ images\)"):
        check_same_data(before, training_record(open_split(config, "train")))
