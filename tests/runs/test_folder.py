"""Folders of sweeps: names, states and reservations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_train.runs.folder import SweepFolder, mark, named, scores, status
from moa_train.runtime.errors import UserError
from moa_train.runtime.lock import RunLock


def test_folders_are_named_after_the_swept_settings():
    jobs = [["optim.lr=0.001", "runtime.seed=0"], ["optim.lr=0.002", "runtime.seed=0"]]
    assert [job.name for job in named(jobs, ["optim.lr", "runtime.seed"])] == ["lr-0.001_seed-0", "lr-0.002_seed-0"]
    assert [job.overrides for job in named(jobs, ["optim.lr", "runtime.seed"])] == jobs


def test_settings_of_the_same_last_name_keep_their_sections():
    (job,) = named([["model.drop_path=0.1", "model.moa.drop_path=0.2"]], ["model.drop_path", "model.moa.drop_path"])
    assert job.name == "model.drop_path-0.1_model.moa.drop_path-0.2"


def test_names_are_unique_short_and_safe():
    jobs = [["data.root=/a b"], ["data.root=/a-b"], [f"data.root={'x' * 300}"], ["model.depths=[1,1]"]]
    names = [job.name for job in named(jobs, ["data.root", "model.depths"])]
    assert len(set(names)) == 4
    assert all(len(name) < 140 and not set(name) & set("/=,[]' ") for name in names)


def test_the_states_of_a_run(tmp_path, straight):
    run = tmp_path / "run"
    assert status(run) == "waiting"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    assert status(run) == "stopped"
    with RunLock(run):
        assert status(run) == "running"
    (run / ".lock").write_text(json.dumps({"pid": 2**30, "host": os.uname().nodename}))
    assert status(run) == "stopped"
    mark(run, "failed", exit=1)
    assert status(run) == "failed"
    mark(run, None)
    assert status(run) == "stopped"
    assert status(straight) == "finished"


def test_a_run_that_is_resumed_after_pruning_counts_as_running(tmp_path):
    mark(tmp_path, "pruned")
    script = (
        "import sys; from pathlib import Path; from moa_train.runtime.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert status(tmp_path) == "running"
        process.communicate("")
    assert status(tmp_path) == "pruned"


def test_a_job_is_reserved_by_one_process(tmp_path):
    folder = SweepFolder(tmp_path)
    with folder.hold("a", ["a"]) as first, folder.hold("a", ["a"]) as second, folder.hold("b", ["b"]) as third:
        assert (first, second, third) == (True, False, True)
    with RunLock(folder.run_dir("a")), folder.hold("a", ["a"]) as orphaned:
        assert not orphaned


def test_scores_are_the_evaluations_that_choose_the_best(straight):
    found = scores(straight, "top1")
    assert [number for number, _ in found] == [1, 2, 3]
    assert scores(Path("nowhere"), "top1") == []


def test_a_damaged_record_is_an_error(tmp_path):
    folder = SweepFolder(tmp_path)
    assert folder.arguments() is None
    folder.record(["optim.lr=1,2"])
    assert folder.arguments() == ["optim.lr=1,2"]
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json cannot be read"):
        folder.arguments()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Choose another sweep\.dir"):
        SweepFolder(tmp_path / "file" / "sweep").record([])
