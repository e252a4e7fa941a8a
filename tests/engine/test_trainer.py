"""Which settings change a training and which don't: tiny runs on digits, compared bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_train.tracking.jsonl import read_rows


def differing(one: dict, other: dict) -> list[str]:
    """Return the names of the parts and tensors that differ between two outcomes."""
    tensors = set(one["tensors"].keys() | other["tensors"].keys())
    names = [name for name in sorted(tensors) if one["tensors"].get(name) != other["tensors"].get(name)]
    return names + [part for part in ("step", "state") if one[part] != other[part]]


def rows_of(found: dict) -> list[dict]:
    """Return the log without final evaluations, because sessions that stop early have additional ones."""
    return [row for row in found["rows"] if row.get("split") != "test"]


def test_a_run_writes_its_rows_and_checkpoints(straight, outcome):
    found = outcome(straight)
    assert found["step"] == 12
    assert {name.partition("/")[0] for name in found["tensors"]} == {"model", "ema", "optimizer"}
    assert [(row["kind"], row["step"]) for row in rows_of(found)] == [
        ("train", 3),
        ("eval", 4),
        ("train", 6),
        ("eval", 8),
        ("train", 9),
        ("train", 12),
        ("eval", 12),
    ]
    assert found["rows"][0]["epoch"] == pytest.approx(3 * 32 / 100)
    result = json.loads((straight / "result.json").read_text())
    (last,) = [row for row in found["rows"] if row.get("split") == "test"]
    assert {key: last[key] for key in result["test"]} == result["test"]
    assert last["epoch"] == pytest.approx(12 * 32 / 100)
    assert result["test"]["total"] == 359
    assert result["val"] == found["state"]["best"]


@pytest.mark.parametrize(
    ("changes"),
    [
        {"engine__eval_every": "1 step", "tracking__log_every": 1},
        {"engine__eval_every": "5 steps", "engine__save_every": "1 step", "tracking__log_every": 7},
        {"engine__eval_split": "none", "engine__save_every": "100%", "tracking__images": 4},
        {"engine__eval_batch_size": 7, "tracking__loggers": "[tensorboard]", "engine__keep_every": "3 steps"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_evaluation_logging_and_saving_do_not_change_the_training(straight, train, outcome, tmp_path, changes):
    assert train(tmp_path / "run", **changes) == 0
    found, expected = outcome(tmp_path / "run"), outcome(straight)
    assert found["tensors"] == expected["tensors"]
    assert [row for row in found["rows"] if row["kind"] == "train"]


def test_a_different_lr_changes_the_weights(straight, train, outcome, tmp_path):
    assert train(tmp_path / "run", optim__lr=9.1e-4) == 0
    assert outcome(tmp_path / "run")["tensors"] != outcome(straight)["tensors"]


@pytest.mark.parametrize("stops", [[1], [4], [5, 8], [11]], ids=str)
def test_a_stopped_and_resumed_run_ends_like_an_uninterrupted_one(straight, train, outcome, tmp_path, stops):
    """These stops are in the middle of epochs, which begin in steps 4, 7 and 10, and between log rows (3, 6, ...)."""
    run_dir = tmp_path / "run"
    assert train(run_dir, engine__stop_after=f"{stops[0]} steps") == 0
    assert outcome(run_dir)["step"] == stops[0]
    for stop in stops[1:]:
        assert train(run_dir, resume=True, engine__stop_after=f"{stop} steps") == 0
        assert outcome(run_dir)["step"] == stop
    assert train(run_dir, resume=True) == 0
    found, expected = outcome(run_dir), outcome(straight)
    assert differing(found, expected) == []
    assert rows_of(found) == rows_of(expected)
    assert found["rows"][-1] == expected["rows"][-1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (run_dir, straight)]
    assert results[0]["test"] == results[1]["test"]


@pytest.mark.parametrize("change", [{"schedule__duration": "20 steps"}, {"optim__lr": 3e-4}], ids=str)
def test_after_a_change_the_schedule_continues_as_if_it_had_always_been_this_one(straight, train, tmp_path, change):
    def lrs(run_dir: Path) -> dict[int, float]:
        rows = read_rows(run_dir / "metrics.jsonl")
        return {row["step"]: row["lr"] for row in rows if row["kind"] == "train" and row["step"] > 5}

    assert train(tmp_path / "run", engine__stop_after="5 steps") == 0
    assert train(tmp_path / "run", resume=True, **change) == 0
    assert train(tmp_path / "always", **change) == 0
    assert lrs(tmp_path / "run") == lrs(tmp_path / "always") != lrs(straight)


def test_resuming_a_finished_run_changes_nothing(straight, train, outcome, tmp_path):
    run_dir = tmp_path / "run"
    assert train(run_dir, schedule__duration="4 steps") == 0
    before, log = outcome(run_dir), (run_dir / "metrics.jsonl").read_text()
    assert train(run_dir, resume=True) == 0
    assert differing(outcome(run_dir), before) == []
    assert (run_dir / "metrics.jsonl").read_text() == log


def test_two_ranks_resumed_by_torchrun_end_like_an_uninterrupted_run(two_ranks, outcome):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "moa_train.cli.train"]
    done = subprocess.run(
        [sys.executable, *command, f"resume={two_ranks / 'first'}"],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("resumed") + done.stderr.count("resumed") == 1  # only rank 0 prints
    found, expected = outcome(two_ranks / "first"), outcome(two_ranks / "whole")
    assert expected["step"] == 12
    assert differing(found, expected) == []
    assert rows_of(found) == rows_of(expected)


def test_two_ranks_train_like_one(two_ranks, train, outcome, tmp_path):
    """Mixing and dropout are the same for each micro-batch; only the order of sums differs, and thus the rounding."""
    assert train(tmp_path / "run", engine__micro_batch_size=8) == 0
    alone, shared = (read_rows(folder / "metrics.jsonl") for folder in (tmp_path / "run", two_ranks / "whole"))
    for one, other in zip(alone, shared, strict=True):
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert len(alone) == 8


def test_every_run_gets_its_own_folder(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train(None, schedule__duration="1 step", schedule__warmup="0", engine__eval_split="none") == 0
    folders = sorted(path for path in Path("outputs").iterdir())
    assert len(folders) == 2
    assert all((folder / "result.json").exists() for folder in folders)
