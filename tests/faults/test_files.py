"""Rows 2, 9, 10, 12, 18: damaged and malicious files, full disks, missing permissions, and wrong time stamps."""

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launch import EVALUATE, TINY, Job, files, result, state_hash, train_rows

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.manifest import Checkpoint, compose

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.fixture
def run(tmp_path: Path, whole: Path) -> Path:
    """A copy of a finished run, which a test may damage; it has the checkpoints of steps 15 and 18 and the best one."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy, symlinks=True)
    return copy


def expected(run: Path) -> tuple[int, int]:
    """Return the steps of the two newest checkpoints, the newest one first."""
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    return steps[-1], steps[-2]


def assert_fallback(run: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the store falls back to the previous checkpoint, with a warning that names the file."""
    newest, previous = expected(run)
    caplog.clear()
    found = CheckpointStore(run).newest()
    assert found is not None
    assert found.step == previous
    assert f"step-{newest:08d}/{name}" in caplog.text
    assert f"Falling back to step {previous}" in caplog.text


@pytest.mark.fault(10)
@pytest.mark.parametrize("name", FILES)
def test_truncation_is_detected(run, name, caplog, inject):
    caplog.set_level(logging.WARNING)
    path = run / "checkpoints" / f"step-{expected(run)[0]:08d}" / name
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        inject()
        assert_fallback(run, name, caplog)


@pytest.mark.fault(10)
def test_a_flipped_bit_is_detected(run, caplog, draw, inject):
    """Flip a random bit of a random file, including the manifest, a hundred times."""
    caplog.set_level(logging.WARNING)
    for _ in range(100):
        name = draw.choice(FILES)
        path = run / "checkpoints" / f"step-{expected(run)[0]:08d}" / name
        whole = path.read_bytes()
        place = draw.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        inject()
        assert_fallback(run, name, caplog)
        path.write_bytes(whole)


@pytest.mark.fault(10)
def test_resuming_from_the_last_intact_checkpoint_gives_the_same_result(run, whole, draw, inject):
    folder = run / "checkpoints" / f"step-{expected(run)[0]:08d}"
    path = folder / draw.choice(FILES)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    inject()
    said = Job(f"{TINY} run_dir={run} resume=auto", run.parent).ended(0)
    assert str(path) in said
    assert result(run) == result(whole)


@pytest.mark.fault(10)
def test_a_run_without_intact_checkpoints_does_not_start_over(run, inject):
    for path in (run / "checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"")
        inject()
    before = list(files(run))
    said = Job(f"{TINY} run_dir={run} resume=auto", run.parent).ended(2)
    assert "No checkpoint in" in said
    assert len(said.strip().splitlines()) <= 10
    assert list(files(run)) == before


@pytest.mark.fault(18)
def test_time_stamps_are_ignored(run, whole, draw, inject):
    """Checkpoints are chosen by step, even if time stamps of files and folders are up to a day off."""
    newest, now = expected(run)[0], 1.8e9
    for _ in range(10):
        for path in (run / "checkpoints").rglob("*"):
            moment = now + draw.uniform(-86400, 86400)
            os.utime(path, (moment, moment), follow_symlinks=False)
        inject()
        assert CheckpointStore(run).newest().step == newest


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def sealed(folder: Path) -> None:
    """Write a manifest that matches a manipulated folder, which is the most that an attacker can do."""
    checkpoint = json.loads((folder / "manifest.json").read_text())
    entries = {
        name: (len(data := (folder / name).read_bytes()), hashlib.sha256(data).hexdigest())
        for name in checkpoint["files"]
    }
    (folder / "manifest.json").write_bytes(compose(checkpoint["step"], checkpoint["score"], entries))


def malicious_weights(folder: Path, mark: Path) -> Iterator[Path]:
    """Yield weights files that are pickles or have forged headers."""
    for name, write in (
        ("pickle.safetensors", lambda path: path.write_bytes(pickle.dumps(Bomb(mark)))),
        ("torch.safetensors", lambda path: torch.save({"model": Bomb(mark)}, path)),
        ("pickle.pth", lambda path: torch.save({"model": Bomb(mark)}, path)),
    ):
        write(folder / name)
        yield folder / name
    for number, header in enumerate(
        (
            {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
            {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}},
            {"__metadata__": {"config": '{"_target_": "os.system"}', "classes": "[]"}},
            {"__metadata__": {"config": "[" * 9, "classes": "[]"}},
            {"__metadata__": {"config": '{"model": "os.system"}', "classes": "[]"}},
            {"__metadata__": {"config": "{}", "classes": "{}"}},
        )
    ):
        text = json.dumps(header).encode()
        path = folder / f"forged-{number}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        yield path
    path = folder / "huge.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    yield path


@pytest.mark.fault(9)
def test_malicious_weights_are_rejected_and_run_no_code(tmp_path, inject):
    mark = tmp_path / "mark"
    for number, path in enumerate(malicious_weights(tmp_path, mark)):
        jobs = [Job(f"ckpt={path}", tmp_path, module=EVALUATE)]
        if number < 3:
            jobs += [Job(f"{TINY} run_dir={tmp_path / 'new'} init={path}", tmp_path)]
        for job in jobs:
            inject()
            said = job.ended(2)
            assert "Traceback" not in said
            assert len(said.strip().splitlines()) <= 20
        assert not mark.exists()


@pytest.mark.fault(9)
def test_malicious_checkpoints_are_rejected_and_run_no_code(run, inject):
    """Resume from malicious checkpoints that are the only ones of their run, so that there is no fallback."""
    mark, outside = run.parent / "mark", run.parent / "outside"
    outside.write_text("x")
    newest = expected(run)[0]
    for path in (run / "checkpoints").iterdir():
        if path.name != f"step-{newest:08d}":
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    folder = run / "checkpoints" / f"step-{newest:08d}"
    shutil.copytree(folder, run.parent / "sound")

    def with_target() -> None:
        state = json.loads((folder / "state.json").read_text())
        state["config"]["model"] = {"_target_": "os.mkdir", "_args_": [str(mark)]}
        (folder / "state.json").write_text(json.dumps(state))

    def pickled_model() -> None:
        (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))

    def pickled_state() -> None:
        (folder / "state.json").write_bytes(pickle.dumps(Bomb(mark)))

    def link() -> None:
        (folder / "model.safetensors").rename(run.parent / "model.safetensors")
        (folder / "model.safetensors").symlink_to(run.parent / "model.safetensors")

    def parent() -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["../../../outside"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    for tamper, seal in ((with_target, 1), (pickled_model, 1), (pickled_state, 1), (link, 1), (parent, 0)):
        tamper()
        if seal:
            sealed(folder)
        inject()
        said = Job(f"resume={run}", run.parent).ended(2)
        assert "Traceback" not in said
        assert len(said.strip().splitlines()) <= 10
        assert not mark.exists()
        shutil.rmtree(folder)
        shutil.copytree(run.parent / "sound", folder)
    assert outside.read_text() == "x"
    assert Checkpoint.open(folder).verify().step == newest


@pytest.mark.fault(12)
def test_a_full_disk_is_reported_and_the_run_resumes_with_free_space(tmp_path, whole, draw, inject):
    """Simulate a full disk by a limit on the size of files, which a checkpoint exceeds."""
    run = tmp_path / "run"
    Job(f"{TINY} run_dir={run} engine.stop_after='4 steps'", tmp_path).ended(0)
    before = list(files(run / "checkpoints"))
    for _ in range(2):
        limit = draw.randrange(20_000, 100_000)
        said = Job(f"{TINY} run_dir={run} resume=auto", tmp_path, limit=limit).ended(2)
        inject()
        assert "Cannot save step" in said
        assert "File too large" in said
        assert "Traceback" not in said
        assert list(files(run / "checkpoints")) == before
    Job(f"{TINY} run_dir={run} resume=auto", tmp_path).ended(0)
    assert state_hash(run) == state_hash(whole)
    assert train_rows(run) == train_rows(whole)


@pytest.mark.fault(12)
def test_a_disk_that_is_full_from_the_start_is_reported(tmp_path, inject):
    job = Job(f"{TINY} run_dir={tmp_path / 'run'}", tmp_path, limit=2_000)
    inject()
    said = job.ended(2)
    assert f"{tmp_path / 'run' / 'config.json'} cannot be written: File too large" in said
    assert "Traceback" not in said


@pytest.mark.fault(12)
@pytest.mark.parametrize("where", ["run", "run/checkpoints", "new"])
def test_a_folder_without_write_permission_is_reported(tmp_path, tmp_path_factory, whole, where, inject):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000018")
    target = tmp_path / where
    (tmp_path if where == "new" else target).chmod(0o555)
    logs = tmp_path_factory.mktemp("logs")
    resume = f"{TINY} run_dir={tmp_path / where.split('/')[0]} resume=auto"
    job = Job(resume, logs, obedient=True)
    try:
        said = job.ended(2)
    finally:
        (tmp_path if where == "new" else target).chmod(0o777)
    inject()
    assert "Permission denied" in said
    assert "Traceback" not in said
    assert str(target) in said


@pytest.mark.fault(12)
@pytest.mark.parametrize("command", ["run_dir={}/run", "-m optim.lr=1e-3,2e-3 sweep.dir={}/run"])
def test_a_current_folder_without_write_permission_is_no_obstacle(tmp_path, command, inject):
    here = tmp_path / "here"
    here.mkdir(mode=0o555)
    inject()
    short = TINY.replace("'18 steps'", "'1 step'")
    Job(f"{short} {command.format(tmp_path)}", tmp_path, places=[here], obedient=True).ended(0)
    assert len(list((tmp_path / "run").rglob("result.json"))) == (2 if "-m" in command else 1)
