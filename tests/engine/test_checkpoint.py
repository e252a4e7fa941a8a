"""Saving, finding and keeping checkpoints. The damage is real: see test_checkpoint_faults for kills and full disks."""

import json
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moa_train.engine import checkpoint
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.manifest import FILES, Checkpoint
from moa_train.engine.snapshot import Snapshot
from moa_train.engine.tensorfile import CheckpointError
from moa_train.runtime import faults


def save(store: CheckpointStore, step: int, score: float | None = None, background: bool = False) -> None:
    model = {"weight": torch.full((8, 4), float(step)), "count": torch.tensor(step)}
    tensors = {"model": model, "optimizer": {"exp_avg|weight": torch.full((8, 4), -float(step))}}
    state = {"step": step, "rate": 0.1, "best": {"top1": None}}
    store.save(step, tensors, state, metadata={"format": "1"}, score=score, background=background)


def steps(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name[5:]) for path in store.directory.glob("step-*"))


def pointed(store: CheckpointStore) -> dict[str, int]:
    """Where the links for humans lead."""
    return {name: int((store.directory / name).readlink().name[5:]) for name in ("best", "last")}


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


@pytest.mark.parametrize("background", [False, True])
def test_what_was_saved_comes_back(store, background):
    assert store.newest() is None
    assert store.best() is None
    assert not store.directory.exists()  # looking changes nothing
    save(store, 1234, score=81.5, background=background)
    store.wait()
    found = store.newest()
    assert found is not None
    assert found.path == store.directory / "step-00001234"
    assert (found.step, found.score) == (1234, 81.5)
    assert torch.equal(found.tensors("model")["weight"], torch.full((8, 4), 1234.0))
    assert found.tensors("model")["count"].item() == 1234
    assert found.weights("model")[1] == {"format": "1"}
    assert found.weights("optimizer")[1] == {}
    assert found.state == {"step": 1234, "rate": 0.1, "best": {"top1": None}}
    assert ("optimizer" in found, "ema" in found) == (True, False)
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors; it has model\.safetensors, optimizer"):
        found.tensors("ema")
    again = store.best()
    assert again is not None
    assert again.digest == found.digest == store.at(1234).digest
    store.close()


def test_the_manifest_says_what_is_there(store):
    save(store, 3)
    manifest = json.loads((store.directory / "step-00000003/manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["score"]) == (1, 3, None)
    assert list(manifest["files"]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    for name, entry in manifest["files"].items():
        assert (store.directory / "step-00000003" / name).stat().st_size == entry["bytes"]


def test_a_background_save_keeps_the_values_of_its_moment(store):
    weight = torch.zeros(200, 1000)
    for step in range(1, 6):
        store.save(step, {"model": {"weight": weight}}, {}, background=True)
        weight += 1  # training goes on
    store.close()
    newest = store.newest()
    assert newest is not None
    assert newest.tensors("model")["weight"].unique().tolist() == [4.0]


def test_the_newest_is_the_highest_step_whatever_the_clock_says(store):
    store.keep_last = 9
    for step in (2, 10, 9):  # 9: the run went back
        save(store, step)
    for path, age in zip(sorted(store.directory.glob("step-*")), (0, 5, 86400), strict=True):
        for file in (path, *path.iterdir()):
            os.utime(file, (time.time() - age,) * 2)
    assert [found.step for found in [store.newest()] if found] == [10]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell which file is flushed")
def test_all_is_flushed_to_the_disk_before_the_rename_and_the_rename_before_anything_is_removed(store, monkeypatch):
    save(store, 1)
    events: list[str] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def note(event: str, path: object) -> None:
        events.append(f"{event} {Path(str(path)).relative_to(store.directory)}")

    monkeypatch.setattr(os, "fsync", lambda fd: (note("fsync", Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (note("rename", old), rename(old, new)))
    monkeypatch.setattr(os, "unlink", lambda path: (unlink(path), note("unlink", path)))
    store.keep_last = 1
    save(store, 2)
    files = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    saving = ".saving-step-00000002"
    assert events[:7] == [
        *(f"fsync {saving}/{name}" for name in files),
        f"fsync {saving}",
        f"rename {saving}",
        "fsync .",
    ]
    assert events[7] == "unlink step-00000001/manifest.json"


def test_a_step_above_99999999_is_still_found(store):
    save(store, 99_999_999)
    save(store, 100_000_000)
    assert [found.step for found in [store.newest()] if found] == [100_000_000]


# Retention


def test_retention_keeps_the_last_every_nth_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2, keep=lambda step: step % 4 == 0)
    for step, score in enumerate((None, 50.0, 70.0, 60.0, None, 70.0, 65.0, None, None, 1.0), start=1):
        save(store, step, score)
    assert steps(store) == [3, 4, 8, 9, 10]  # of equals (3 and 6) the earliest is the best
    assert [found.step for found in [store.best()] if found] == [3]
    assert pointed(store) == {"best": 3, "last": 10}


def test_a_resume_with_another_interval_keeps_what_was_kept(train, tmp_path):
    changes = {"engine__save_every": "2 steps", "engine__keep_last": 1, "engine__eval_split": "none"}
    assert train(tmp_path, engine__keep_every="4 steps", engine__stop_after="10 steps", **changes) == 0
    assert steps(CheckpointStore(tmp_path)) == [4, 8, 10]
    assert train(tmp_path, resume=True, engine__keep_every="6 steps") == 0
    assert steps(CheckpointStore(tmp_path)) == [4, 8, 12]


def test_a_permanent_checkpoint_stays_permanent_if_its_step_is_saved_again(store):
    """A rollback or a resume saves the same step again, perhaps with another engine.keep_every."""
    store.keep_last = 1
    store.save(1, {"model": {"weight": torch.zeros(2)}}, {"kept": True})
    save(store, 1)
    assert store.newest().state["kept"] is True
    for step in (2, 3):
        save(store, step)
    assert steps(store) == [1, 3]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_no_best(store, score):
    save(store, 1, 10.0)
    save(store, 2, score)
    assert [found.step for found in [store.best()] if found] == [1]


def test_retention_counts_valid_ones_only(store):
    for step in (1, 2, 3):
        save(store, step)
    (store.directory / "step-00000003/state.json").write_text("{}")
    save(store, 4)
    assert steps(store) == [2, 4]  # 3 is damaged, so 2 is one of the last two


def test_a_damaged_best_hands_over_to_the_next(store, caplog):
    save(store, 1, 90.0)
    save(store, 2, 80.0)
    save(store, 3)
    (store.directory / "step-00000001/model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert [found.step for found in [store.best()] if found] == [2]
    assert "step-00000001, the best checkpoint so far, is damaged" in caplog.text


def test_nothing_foreign_is_ever_removed(store):
    store.directory.mkdir(parents=True)
    foreign = ["notes.txt", "step-x/model.safetensors", "step-00000001/notes.txt", "best/mine", "old/step-00000001/a"]
    for name in foreign:
        (store.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (store.directory / name).write_text("mine")
    elsewhere = store.directory.parent / "elsewhere"
    save(CheckpointStore(elsewhere), 1)
    (store.directory / "step-00000002").symlink_to(elsewhere / "checkpoints/step-00000001")
    for step in range(1, 8):
        if step != 2:
            save(store, step)
    for name in foreign:
        assert (store.directory / name).read_text() == "mine"
    assert sorted(path.name for path in (store.directory / "step-00000001").iterdir()) == ["notes.txt"]
    assert len(list((elsewhere / "checkpoints/step-00000001").iterdir())) == 4
    assert [found.step for found in [store.newest()] if found] == [7]


def test_saving_a_step_again_replaces_it(store):
    save(store, 5)
    before = store.at(5).digest
    save(store, 5, score=1.0)
    assert store.at(5).digest != before
    assert store.at(5).score == 1.0
    assert [path.name for path in store.directory.iterdir() if path.is_dir() and not path.is_symlink()] == [
        "step-00000005"
    ]


# Damage


@pytest.fixture
def three(store) -> CheckpointStore:
    store.keep_last = 3
    for step in (1, 2, 3):
        save(store, step)
    return store


def fallen_back(store: CheckpointStore, caplog) -> tuple[int, str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = store.newest()
    assert found is not None
    return found.step, caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_truncation_is_noticed_and_named(three, caplog, name):
    path = three.directory / "step-00000003" / name
    content = path.read_bytes()
    assert fallen_back(three, caplog) == (3, "")
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        step, warning = fallen_back(three, caplog)
        assert step == 2
        assert str(path) in warning
        assert "Falling back to step 2" in warning
        assert name == "manifest.json" or f"it has {length} bytes instead of {len(content)}" in warning
    path.write_bytes(content + b"\n")
    assert fallen_back(three, caplog)[0] == 2
    path.unlink()
    assert fallen_back(three, caplog)[0] == 2
    path.write_bytes(content)
    assert fallen_back(three, caplog) == (3, "")


def test_every_flipped_bit_is_noticed(three, caplog):
    """Some in every byte of the manifest, which nothing else vouches for; every hundredth in the other files."""
    for path in sorted((three.directory / "step-00000003").iterdir()):
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 7 if path.name == "manifest.json" else 101):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=path.name):
                Checkpoint.open(path.parent).verify()
        step, warning = fallen_back(three, caplog)
        assert (step, path.name in warning) == (2, True)
        path.write_bytes(content)
    assert fallen_back(three, caplog) == (3, "")


def test_only_damaged_ones_are_an_error_and_no_fresh_start(three):
    for step in (1, 2, 3):
        (three.directory / f"step-{step:08d}/state.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"(?s)No checkpoint in .* is valid:.*step-00000003/state\.json is damaged"
    ):
        three.newest()
    for step in (1, 2, 3):
        (three.directory / f"step-{step:08d}/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="to start from scratch"):
        three.newest()


@pytest.mark.parametrize("look", [CheckpointStore.newest, CheckpointStore.best])
def test_what_is_removed_while_somebody_looks_is_looked_for_again(tmp_path, caplog, monkeypatch, look):
    writer, reader = CheckpointStore(tmp_path, keep_last=1), CheckpointStore(tmp_path)
    save(writer, 1, score=1.0)
    opened = Checkpoint.open

    def overtaken(path: Path) -> Checkpoint:
        monkeypatch.setattr(Checkpoint, "open", opened)
        found = opened(path)
        save(writer, 2, score=2.0)  # removes step 1
        return found

    monkeypatch.setattr(Checkpoint, "open", overtaken)
    found = look(reader)
    assert found is not None
    assert found.step == 2
    assert caplog.text == ""


def test_a_file_is_verified_when_it_is_read(three):
    found = Checkpoint.open(three.directory / "step-00000003")  # opened, not verified
    path = found.path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        found.tensors("model")
    assert found.state["step"] == 3


def test_one_checkpoint_cannot_stand_in_for_another(three, caplog):
    shutil.rmtree(three.directory / "step-00000003")
    shutil.copytree(three.directory / "step-00000001", three.directory / "step-00000003")
    step, warning = fallen_back(three, caplog)
    assert step == 2
    assert "belongs to step 1" in warning


def resigned(folder: Path, **changes: object) -> None:
    """Forge a manifest whose own sum is right: what somebody does who means it."""
    import hashlib

    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    content |= changes
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": own}, indent=1) + "\n")


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "model.safetensors/../x", ".", "", "other.safetensors"]
)
def test_a_manifest_cannot_name_other_files(three, caplog, name):
    folder = three.directory / "step-00000003"
    (three.directory.parent / "secret").write_text("secret")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    resigned(folder, files=dict(sorted({**files, name: {"bytes": 6, "sha256": "0" * 64}}.items())))
    step, warning = fallen_back(three, caplog)
    assert step == 2
    assert "lists the wrong files" in warning


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": []},
        {"files": None},
        {"step": "3"},
        {"step": 2},
        {"step": None},
        {"format": 2},
        {"more": 1},
        {"_target_": "os.system"},
        {"score": {"a": 1}},
        {"score": "high"},
    ],
)
def test_a_manifest_of_another_form_is_refused(three, caplog, changes):
    resigned(three.directory / "step-00000003", **changes)
    assert fallen_back(three, caplog)[0] == 2
    assert three.best() is None


def test_links_and_pipes_in_the_place_of_files_are_refused(three, caplog):
    for name in FILES[:1] + FILES[3:]:
        path = three.directory / "step-00000003" / name
        content = path.read_bytes()
        (three.directory.parent / "elsewhere").write_bytes(content)
        path.unlink()
        path.symlink_to(three.directory.parent / "elsewhere")
        step, warning = fallen_back(three, caplog)
        assert (step, "not a regular file" in warning) == (2, True)
        path.unlink()
        os.mkfifo(path)  # opening it would wait for ever
        assert fallen_back(three, caplog)[0] == 2
        path.unlink()
        path.write_bytes(content)
    (three.directory / "step-00000003/manifest.json").unlink()
    os.mkfifo(three.directory / "step-00000003/manifest.json")
    assert fallen_back(three, caplog)[0] == 2


def test_json_can_be_nested_as_deep_as_it_likes(three, caplog):
    (three.directory / "step-00000003/manifest.json").write_text("[" * 200_000)
    assert fallen_back(three, caplog)[0] == 2


# Failing saves that need no process of their own


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    faults.arm({})


def test_state_that_is_no_json_is_refused_before_anything_is_written(store):
    with pytest.raises(TypeError):
        store.save(1, {"model": {}}, {"model": torch.nn.Linear(1, 1)}, background=True)
    assert not store.directory.exists()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("point", ["mid_write", "before_fsync", "before_manifest", "before_rename"])
def test_a_full_disk_leaves_no_trace_and_the_next_save_works(store, point, background):
    save(store, 1)
    faults.arm({"MOA_TRAIN_FAULTS": f"checkpoint.{point}=full"})
    with pytest.raises(CheckpointError, match=r"Cannot save step 2 in .*No space left on device"):  # noqa: PT012
        save(store, 2, background=background)
        store.wait()
    assert sorted(path.name for path in store.directory.iterdir()) == ["last", "step-00000001"]
    assert [found.step for found in [store.newest()] if found] == [1]
    save(store, 2, background=background)
    store.close()
    assert [found.step for found in [store.newest()] if found] == [2]


def test_waiting_for_storage_that_does_not_answer_is_said(store, monkeypatch, caplog):
    answer = threading.Event()
    write = Snapshot.write

    def write_late(self: Snapshot, folder: Path) -> None:
        answer.wait(20)
        write(self, folder)

    monkeypatch.setattr(Snapshot, "write", write_late)
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.05)
    caplog.set_level(logging.WARNING)
    save(store, 1, background=True)
    threading.Timer(0.3, answer.set).start()
    store.wait()
    assert store.newest().step == 1
    assert f"Waiting for a save in {store.directory}" in caplog.messages[0]


def test_the_error_of_a_background_save_comes_at_the_next_call(store):
    for call in (store.poll, store.wait, store.close, lambda: save(store, 2)):
        faults.arm({"MOA_TRAIN_FAULTS": "checkpoint.before_rename=raise"})
        save(store, 1, background=True)
        while store._saving is not None and not store._saving.done():
            time.sleep(0.001)
        with pytest.raises(faults.InjectedFaultError):
            call()
        store.poll()
        assert not any(store.directory.iterdir())


def test_leaving_by_an_error_finishes_the_save_and_keeps_that_error(store, caplog):
    with pytest.raises(ZeroDivisionError), store:  # noqa: PT012
        save(store, 1, background=True)
        1 / 0  # noqa: B018
    assert [found.step for found in [store.newest()] if found] == [1]
    faults.arm({"MOA_TRAIN_FAULTS": "checkpoint.before_rename=full"})
    with pytest.raises(ZeroDivisionError), store:  # noqa: PT012
        save(store, 2, background=True)
        1 / 0  # noqa: B018
    assert "Cannot save step 2" in caplog.text
    faults.arm({"MOA_TRAIN_FAULTS": "checkpoint.before_rename=full"})
    with pytest.raises(CheckpointError), store:
        save(store, 2, background=True)


def test_a_save_larger_than_the_free_space_is_refused_before_it_starts(store):
    huge = torch.empty(1, device="cpu").expand(2**60)  # 4 EiB, of one number
    with pytest.raises(CheckpointError, match=r"requires 4398046511104 MiB, but .* has only \d+ MiB free"):
        store.save(1, {"model": {"huge": huge}}, {})
    assert not any(store.directory.iterdir())


def test_poll_does_not_wait_for_a_save(store):
    store._executor, release = ThreadPoolExecutor(1), threading.Event()
    store._executor.submit(release.wait)  # keeps the only thread that saves busy
    save(store, 1, background=True)
    store.poll()
    assert store.newest() is None
    release.set()
    store.close()
    assert store.newest() is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("background", [False, True])
def test_tensors_on_the_gpu_are_saved_as_they_were(store, background):
    weight = torch.zeros(1000, 1000, device="cuda")
    for step in range(1, 6):
        store.save(step, {"model": {"weight": weight}}, {}, background=background)
        weight += 1
    store.close()
    newest = store.newest()
    assert newest is not None
    assert newest.tensors("model")["weight"].unique().tolist() == [4.0]


def test_scores_that_were_measured_differently_do_not_compete(tmp_path):
    def state(step, measured, best):
        return {"train": {"step": step, "best": {"step": best}}, **({"measured": measured} if measured else {})}

    with CheckpointStore(tmp_path, keep_last=9) as store:
        for step, score, measured, best in (
            (1, 90.0, None, 1),  # of an older version, which did not record it
            (2, 80.0, "test", 2),
            (3, 50.0, "val", 3),
            (4, 40.0, "val", 3),
        ):
            store.save(step, {"model": {"w": torch.zeros(1)}}, state(step, measured, best), score=score)
        assert store.best().step == 3
        store.save(5, {"model": {"w": torch.zeros(1)}}, state(5, "val", 1))  # an older version's best still counts
        assert store.best().step == 1


def test_the_best_of_an_earlier_measurement_is_kept(tmp_path):
    with CheckpointStore(tmp_path, keep_last=1) as store:
        for step, (score, split) in enumerate([(90.0, "test"), (80.0, "test"), (50.0, "val"), (40.0, "val")]):
            store.save(step, {"model": {"w": torch.zeros(1)}}, {"train": {}, "measured": {"split": split}}, score=score)
        assert store.best().step == 2
        assert steps(store) == [0, 2, 3]
