"""From a configuration to a run."""

import json
import shutil
from pathlib import Path

import pytest

from moa_train.assembly.evaluation import measurement
from moa_train.assembly.run import build_run
from moa_train.data.dataset import open_split
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.signals import StopSignals
from moa_train.tracking.jsonl import read_rows


def test_without_a_validation_split_nothing_is_evaluated_during_training(tiny, tmp_path: Path):
    config = tiny({"data.val_fraction": "0"})
    with Distributed.start("cpu", 60.0) as alone:
        run = build_run(config, run_dir=tmp_path, distributed=alone, stop=StopSignals())
    run.trainer.tracker.close()
    assert run.trainer.evaluate is None
    assert (run.trainer.eval_split, run.final_split) == ("none", "test")


CHANGED = {
    "split": {"engine__eval_split": "test"},
    "mean": {"data__mean": "[0.1,0.1,0.1]"},
}


@pytest.mark.parametrize("changed", CHANGED)
def test_the_best_is_sought_anew_where_scores_are_measured_differently(straight, train, tmp_path, capsys, changed):
    run_dir = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    before = CheckpointStore(run_dir).best()
    assert train(run_dir, resume=True, schedule__duration="16 steps", engine__keep_last=1, **CHANGED[changed]) == 0
    out = capsys.readouterr().out
    assert f"The checkpoint of step {before.step} is kept." in out
    assert CheckpointStore(run_dir).at(before.step).digest == before.digest
    assert "The search for the best checkpoint restarts at step 12, because the best score" in out
    assert f" measured differently: {changed} " in out
    result = json.loads((run_dir / "result.json").read_text())
    split = result["measured"]["split"]
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("split") == split and "best" in row]
    anew = {row["step"]: row for row in rows if row["step"] >= 12}  # of step 12, the later row
    best = max(anew.values(), key=lambda row: (row["top1"], -row["step"]))
    assert (result["step"], result[split]["top1"]) == (best["step"], best["top1"])
    found = CheckpointStore(run_dir).best()
    assert found is not None
    assert (found.step, found.score) == (best["step"], best["top1"])
    assert found.state["measured"]["split"] == split


@pytest.mark.parametrize("keep_last", [1, 9])
def test_a_lost_best_checkpoint_is_replaced(train, tmp_path, capsys, keep_last):
    """Otherwise, its score could remain unreached, and the finished run would have no checkpoint to report."""
    run_dir, worse = tmp_path / "run", {"optim__lr": 100, "engine__keep_last": keep_last}
    learning = {"optim__name": "adamw", "optim__lr": 0.1, "augment__mixup": 0, "engine__ema_decay": 0}
    assert train(run_dir, **learning, engine__best_by="loss", engine__keep_last=keep_last) == 0
    assert train(run_dir, resume=True, schedule__duration="16 steps", **worse) == 0
    best = CheckpointStore(run_dir).best()
    shutil.rmtree(best.path)
    second = CheckpointStore(run_dir).best()
    capsys.readouterr()
    assert train(run_dir, resume=True, schedule__duration="20 steps", **worse) == 0
    out = capsys.readouterr().out
    assert f"The checkpoint of step {best.step}, the best one so far, is missing or damaged." in out
    result = json.loads((run_dir / "result.json").read_text())
    assert result["step"] == CheckpointStore(run_dir).best().step
    if keep_last == 1:
        assert "No other one has a score." in out
        assert result["step"] in (16, 20)
    else:
        assert f"The best one is now that of step {second.step}." in out
        assert result["step"] == second.step < best.step
    rows = [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if row.get("split") == "val"]
    assert rows == [4, 8, 12, 16, 20]


def test_equal_measurements_keep_the_best(straight, train, tmp_path, capsys):
    run_dir = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    before = json.loads((run_dir / "result.json").read_text())
    assert train(run_dir, resume=True, engine__eval_split="val", engine__eval_batch_size=7) == 0  # it was auto
    assert "restarts at step" not in capsys.readouterr().out
    after = json.loads((run_dir / "result.json").read_text())
    assert [after[key] for key in ("step", "val", "measured")] == [before[key] for key in ("step", "val", "measured")]


def test_what_a_score_depends_on(tiny):
    def measured(changes):
        config = tiny(changes)
        return measurement(config, "val", {"val": open_split(config.data, "val")})

    usual = measured({})
    for key, value in (
        ("data.eval_crop", 0.5),
        ("data.std", "[0.1,0.1,0.1]"),
        ("data.val_fraction", 0.2),
        ("engine.ema_decay", 0),
        ("engine.best_by", "loss"),
        ("runtime.eval_precision", "bf16"),
    ):
        assert measured({key: value}) != usual
    for key, value in (("engine.eval_batch_size", 7), ("runtime.precision", "bf16"), ("data.workers", 3)):
        assert measured({key: value}) == usual
