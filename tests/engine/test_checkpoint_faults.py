"""Saves that are killed, starved of disk or of permission, for real: in forked processes, to import torch once."""

import contextlib
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.tensorfile import CheckpointError
from moa_train.runtime import faults

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
try:
    import launch
finally:
    sys.path.pop(0)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def save(store: CheckpointStore, step: int, score: float | None = None, background: bool = False) -> None:
    model = {name: torch.full((50, 20), float(step)) for name in ("a", "b")}
    tensors = {"model": model, "ema": model, "optimizer": {"exp_avg|a": model["a"]}}
    store.save(step, tensors, {"step": step}, score=score, background=background)


def fork(action: Callable[[], object]) -> int:
    """Run ``action`` in a process of its own, and return its number."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def in_child(action: Callable[[], object]) -> int:
    """Run ``action`` in a process of its own; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])


def valid_steps(store: CheckpointStore) -> list[int]:
    steps = []
    for folder in store._folders():
        with contextlib.suppress(CheckpointError):
            steps.append(store.at(int(folder.name[5:13])).step)
    return sorted(set(steps))


POINTS = [
    *(f"mid_write=kill@{n}" for n in range(1, 6)),
    *(f"before_fsync=kill@{n}" for n in range(1, 4)),
    "before_manifest=kill",
    "before_rename=kill",
    "between_renames=kill",
    "after_rename=kill",
    "before_prune=kill",
    *(f"mid_remove=kill@{n}" for n in range(1, 6)),
]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["next", "again"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_of_a_save(tmp_path, point, again, background):
    """A valid checkpoint is there, the best is the best, and the next process carries on as if nothing had been."""
    store = CheckpointStore(tmp_path, keep_last=2)
    for step, score in ((1, 9.0), (2, None), (3, None)):
        save(store, step, score)
    step = 3 if again else 4

    def killed() -> None:
        faults.arm({"MOA_TRAIN_FAULTS": f"checkpoint.{point}"})
        with CheckpointStore(tmp_path, keep_last=2) as own:
            save(own, step, score=8.0, background=background)

    reached = in_child(killed) == -signal.SIGKILL
    assert reached or (point.startswith("between_renames") and not again)
    seen = CheckpointStore(tmp_path)
    newest, best = seen.newest(), seen.best()
    assert newest is not None
    assert best is not None
    done = not reached or point.startswith(("after_rename", "before_prune", "mid_remove"))
    assert newest.step == (step if done else 3)
    assert newest.score == (8.0 if done else None)
    assert newest.tensors("model")["b"].unique().tolist() == [newest.step]
    assert best.step == 1
    assert len(valid_steps(seen)) >= 2

    successor = CheckpointStore(tmp_path, keep_last=2)
    save(successor, 5, score=8.5)
    names = sorted(path.name for path in successor.directory.iterdir() if not path.is_symlink())
    assert names == ["step-00000001", f"step-{newest.step:08d}", "step-00000005"]
    assert valid_steps(successor) == [1, newest.step, 5]


def test_killed_at_random_moments_a_finished_save_is_never_lost(tmp_path):
    """Twenty processes one after the other, each killed while it saves as fast as it can."""
    draw, last = random.Random(0), 0
    for attempt in range(20):
        reader, writer = os.pipe()

        def savings(step: int = last, pipe: int = writer) -> None:
            with CheckpointStore(tmp_path, keep_last=1) as store:
                while True:
                    step += 1
                    save(store, step, score=float(-step))
                    os.write(pipe, b"%d\n" % step)

        child = fork(savings)
        reported = last
        if attempt % 2:  # once a save is known to be done, and otherwise whenever
            reported = int(os.read(reader, 100).split()[-1])
        time.sleep(draw.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            reported = max([reported, *(int(line) for line in pipe.read().splitlines())])
        store = CheckpointStore(tmp_path)
        newest, best = store.newest(), store.best()
        last = newest.step if newest else 0
        assert last in (reported, reported + 1)
        assert best is None or best.step == 1
    assert last >= 10
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) <= 4  # the best, the last, one to come, one to go


@pytest.mark.parametrize("background", [False, True])
def test_a_file_size_limit_leaves_the_previous_one_and_the_next_save_works(tmp_path, background):
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def starved() -> None:
        for limit in (0, 1, 1000, 6000):  # bytes a file may have; model.safetensors has some 8200
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(CheckpointError, match=r"Cannot save step 2 .* File too large"):  # noqa: PT012
                save(store, 2, background=background)
                store.wait()
            assert sorted(path.name for path in store.directory.iterdir()) == ["last", "step-00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        save(store, 2, background=background)
        store.close()

    assert in_child(starved) == 0
    assert valid_steps(store) == [1, 2]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """Without the capabilities of root, who may write everywhere."""
    store = CheckpointStore(tmp_path / "run")
    save(store, 1)
    for folder in (store.directory, store.directory / "step-00000001"):
        folder.chmod(0o555)

    def refused() -> None:
        if os.geteuid() == 0:
            launch._obey_permissions()
        with pytest.raises(CheckpointError, match=r"Cannot save step 2 in .*checkpoints: Permission denied"):
            save(store, 2)
        assert [found.step for found in [store.newest()] if found] == [1]

    try:
        assert in_child(refused) == 0
    finally:
        for folder in (store.directory, store.directory / "step-00000001"):
            folder.chmod(0o755)


def test_a_reader_never_sees_less_than_a_valid_checkpoint(tmp_path):
    """moa-eval on a run that goes on: it looks as fast as it can while another process saves and prunes."""
    save(CheckpointStore(tmp_path, keep_last=1), 1, score=1.0)

    def savings() -> None:
        with CheckpointStore(tmp_path, keep_last=1) as store:
            for step in range(2, 100_000):
                save(store, step, score=float(step))

    child = fork(savings)
    try:
        seen = [1]
        while len(set(seen)) < 5:
            newest = CheckpointStore(tmp_path).newest()
            assert newest is not None
            seen.append(newest.step)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert seen == sorted(seen)


def test_stray_temporary_folders_are_cleaned_up_by_the_next_save_only(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    stray = store.directory / ".saving-step-00000007"
    stray.mkdir()
    (stray / "model.safetensors").write_bytes(b"partial")
    store.newest()
    store.best()
    assert stray.exists()  # a reader must not take the writer's folder away
    save(store, 2)
    assert not stray.exists()


def test_a_damaged_replacement_gives_way_to_what_it_replaced(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    before = store.at(1).digest

    def killed() -> None:
        faults.arm({"MOA_TRAIN_FAULTS": "checkpoint.after_rename=kill"})
        save(store, 1, score=5.0)

    assert in_child(killed) == -signal.SIGKILL
    folder = store.directory / "step-00000001"
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    newest = store.newest()
    assert newest is not None
    assert newest.digest == store.at(1).digest == before
    save(store, 2)
    assert Path(folder / "notes.txt").read_text() == "mine"
    assert [store.at(1).digest, store.at(1).path.name] == [before, "step-00000001"]
