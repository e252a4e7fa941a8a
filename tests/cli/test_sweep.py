"""Sweeps: all runs are validated before the first one starts, and a failed run does not stop the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_train.runtime.errors import UserError

SHORT = ["schedule.duration=2 steps", "schedule.warmup=0", "tracking=quiet", "runtime.device=cpu", "data.limit=64"]


def sweep(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moa_train.cli.train", *SHORT, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_an_invalid_value_in_any_run_prevents_the_sweep(tmp_path):
    done = sweep("-m", "optim.lr=1e-4,-1,2e-2", cwd=tmp_path)
    assert done.returncode == 2
    assert "optim.lr=-1.0 is out of range" in done.stderr
    assert "No run of the sweep was started" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", [["run_dir=one"], ["run_dir=one", "resume=auto"]])
def test_runs_of_a_sweep_cannot_share_a_folder(tmp_path, shared):
    done = sweep("-m", "optim.lr=1e-3,2e-3", *shared, cwd=tmp_path)
    assert done.returncode == 2
    assert "would share run_dir=one" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_does_not_end_the_sweep(tmp_path):
    done = sweep("-m", "run_dir=run-${data.name}", "data=folder,digits", "data.root=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "1 of 2 runs of the sweep failed" in done.stderr
    (failed,) = [line for line in done.stderr.splitlines() if line.startswith("  failed")]
    assert "data=folder" in failed
    assert json.loads((tmp_path / "run-digits" / "result.json").read_text())["step"] in (1, 2)


def test_a_sweep_needs_no_current_folder_to_write_to(tmp_path):
    folder = f"run_dir={tmp_path}/${{optim.lr}}"
    done = sweep("-m", "optim.lr=1e-3", folder, "engine.eval_split=none", cwd=Path("/proc"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0.001" / "result.json").is_file()


def test_a_finished_run_keeps_its_records(train, tmp_path):
    run_dir = tmp_path / "run"
    assert train(run_dir) == 0
    before = {name: (run_dir / name).read_bytes() for name in ("config.json", "provenance.json")}
    for changes in ({"optim__lr": 0.5}, {"schedule__duration": "6 steps"}):
        with pytest.raises(UserError, match=r"is finished: it has completed 12 steps.*no effect:\n  (optim|schedule)"):
            train(run_dir, resume=True, **changes)
    assert train(run_dir, resume=True) == 0
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    assert train(run_dir, resume=True, schedule__duration="14 steps") == 0
    assert json.loads((run_dir / "config.json").read_text())["schedule"]["duration"] == "14 steps"
