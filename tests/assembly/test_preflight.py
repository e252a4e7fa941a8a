"""preflight=true checks and measures a run, and leaves nothing behind."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from moa_train.assembly.preflight import preflight
from moa_train.runtime.errors import UserError
from moa_train.runtime.seed import set_deterministic
from moa_train.runtime.signals import StopSignals


@pytest.fixture(autouse=True)
def _restore():
    yield
    set_deterministic(False)


@pytest.fixture
def check(tiny, tmp_path, monkeypatch):
    """A function that takes changes and runs a preflight in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def go(changes, **settings):
        config = tiny(changes)
        for name, value in settings.items():
            setattr(config, name, value)
        return preflight(config, StopSignals())

    return go


def test_the_report(check, tmp_path, capsys):
    assert check({}) == 0
    shown = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    rows = dict(re.findall(r"^  (\w+) {2,}(.+)$", shown, re.MULTILINE))
    assert rows["steps"].startswith("12 of ")
    assert rows["evaluations"].startswith("3 of ")
    assert "  best by      top1 on val" in shown
    size = re.match(r"([\d.]+) MiB, written", rows["checkpoint"])
    disk = re.match(r"([\d.]+) MiB of [\d.]+ GiB free: 3 checkpoints", rows["disk"])
    assert float(disk[1]) == pytest.approx(4 * float(size[1]), rel=0.1)
    assert re.fullmatch(r"\w+day, 20\d\d-\d\d-\d\d \d\d:\d\d, if it starts now", rows["end"])
    assert "BatchedMuon   decay" in shown
    assert "AdamW         no_decay" in shown
    assert shown.count("*") > 40  # the schedule
    assert "No problems were found" in shown


def test_sizes_equal_those_of_the_run(check, straight, capsys):
    assert check({}) == 0
    (checkpoint,) = (straight / "checkpoints").glob("step-00000012")
    size = sum(path.stat().st_size for path in checkpoint.iterdir() if path.suffix != ".json") / 2**20
    assert f"  checkpoint   {size:.1f} MiB" in capsys.readouterr().out


def test_all_problems_at_once(check, tmp_path):
    with pytest.raises(UserError) as found:
        check(
            {
                "schedule.warmup": "20 steps",
                "engine.batch_size": "5000",
                "engine.save_every": "often",
                "engine.eval_every": "1 lightyear",
            },
            init="nowhere",
        )
    lines = str(found.value).splitlines()
    assert len(lines) == len(set(lines))
    for fragment in ("engine.batch_size=5000", "warmup (20 steps)", "save_every=often", "1 lightyear", "nowhere"):
        assert sum(fragment in line for line in lines) == 1, found.value
    assert not list(tmp_path.iterdir())


def test_a_run_that_does_not_fit_on_the_disk(check):
    with pytest.raises(UserError, match=r"The checkpoints need [\d.]+ GiB \(\d+ of .*Lower engine\.keep_last"):
        check({"schedule.duration": "1000000000000000 steps", "engine.keep_every": "1 steps"})


def test_a_loss_that_is_not_finite(check, tmp_path):
    with pytest.raises(UserError, match=r"The loss of step \d+ is (nan|inf)\. Lower optim\.lr"):
        check({"optim.name": "sgd", "optim.lr": "1e38", "optim.clip": "none", "schedule.warmup": "0"})
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_cannot_be_created(check, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The run folder cannot be created in .*/file: Not a directory"):
        check({}, run_dir=str(tmp_path / "file" / "run"))


def test_a_resumed_run(check, straight, tmp_path, capsys):
    run = shutil.copytree(straight, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert check({"schedule.duration": "30 steps"}, run_dir=str(run), resume="auto") == 0
    assert re.search(r"^  steps +18 of ", capsys.readouterr().out, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_two_ranks_and_the_exit_code(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["preflight=true", "runtime.device=cpu", "data.limit=64", "engine.batch_size=32", "schedule.warmup=0"]
    words = [*launch, "-m", "moa_train.cli.train", *settings, "schedule.duration=5 steps", "data.val_fraction=0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No problems were found") == 1
    assert "2 rank(s)" in done.stdout
    assert not list(tmp_path.iterdir())
    words = [sys.executable, "-m", "moa_train.cli.train", *settings, "init=nowhere"]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, env=environment).returncode == 2
