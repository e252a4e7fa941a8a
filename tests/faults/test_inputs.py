"""Rows 4, 5, 11, 13 to 17, 19: data, arguments, ranks and folders that are not what they should be."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from launch import (
    EVALUATE,
    TINY,
    TRAIN,
    Job,
    arguments,
    files,
    result,
    rows,
    samples,
    state_hash,
    train_rows,
    wait_for_step,
)
from PIL import Image
from sklearn.datasets import load_digits

from moa_train.data.dataset import open_split
from moa_train.data.loader import TrainLoader
from moa_train.data.order import Order
from moa_train.data.view import RandomResizedCrop
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.predictions import Outcomes
from moa_train.schema import DataConfig

FOLDER = (
    TINY.replace("data=digits data.limit=96 data.val_fraction=0.05", "data=folder")
    .replace("'18 steps'", "'6 steps'")
    .replace("engine.eval_every='5 steps'", "engine.eval_every='3 steps'")
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images: 40 digits to train on, 61 to test on, in three classes."""
    root, digits = tmp_path_factory.mktemp("tree"), load_digits()
    chosen = np.flatnonzero(digits.target < 3)
    for place, number in enumerate(chosen[:101]):
        folder = root / ("train" if place < 40 else "test") / f"digit{digits.target[number]}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[number] * 15.9).astype(np.uint8)
        Image.fromarray(pixels).resize((24, 24)).convert("RGB").save(folder / f"{number:04}.jpg", quality=95)
    return root


@pytest.fixture
def data(tmp_path: Path, tree: Path) -> Path:
    """A copy of the tree, to be damaged."""
    shutil.copytree(tree, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.fault(4)
def test_workers_and_restarts_change_no_batch(tree, draw, inject):
    """0, 1 and 3 workers, that live on or are started anew at a random step."""
    config = DataConfig(name="folder", root=str(tree), image_size=16)
    source, view = open_split(config, "train"), RandomResizedCrop((16, 16), (0.08, 1.0), (3 / 4, 4 / 3))
    order = Order(len(source), 8, seed=3)

    def hashes(workers: int, start: int, steps: int) -> list[bytes]:
        loader = TrainLoader(source, config, order=order, view=view, micro_batch_size=4, workers=workers)
        stream = loader.batches(start)
        batches = [next(stream) for _ in range(2 * steps)]
        return [batch.images.numpy().tobytes() + batch.index.numpy().tobytes() for batch in batches]

    whole = hashes(0, 0, 12)
    for workers in (1, 3):
        inject(2)
        assert hashes(workers, 0, 12) == whole
        restart = draw.randint(1, 11)
        assert hashes(workers, restart, 12 - restart) == whole[2 * restart :]


@pytest.mark.fault(5)
def test_other_numbers_of_ranks_see_the_same(tmp_path, whole_pair, draw, inject):
    """Two ranks, then one, then two: the same samples and pixels at each step, the same loss but for rounding."""
    run, record = tmp_path / "run", tmp_path / "samples"
    first = draw.randint(2, 8)
    for ranks, stop in ((2, first), (1, draw.randint(first + 1, 16)), (2, 18)):
        command = f"{TINY} run_dir={run} resume=auto engine.stop_after='{stop} steps'"
        Job(command, tmp_path, ranks=ranks, record=record).ended(0)
        inject()
    assert samples(record) == samples(whole_pair.parent / "samples")
    for now, then in zip(train_rows(run), train_rows(whole_pair), strict=True):
        assert now["step"] == then["step"]
        assert now["loss"] == pytest.approx(then["loss"], abs=1e-5)


@pytest.mark.fault(11)
def test_another_run_cannot_go_on_in_its_place(tmp_path, whole, inject):
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    before = list(files(run))
    for change, old, new in (
        ("model.embed_dim", 32, 64),
        ("model.depths", [1, 1], [2, 1]),
        ("runtime.seed", 0, 1),
        ("engine.batch_size", 16, 32),
        ("data.limit", 96, 80),
        ("optim.name", "muon", "adamw"),
    ):
        job = Job(f"resume={run} {change}={str(new).replace(' ', '')}", tmp_path)
        inject()
        said = job.ended(2)
        assert f"{change}: {old} -> {new}" in said
        assert "Traceback" not in said
    assert list(files(run)) == before


@pytest.mark.fault(11)
@pytest.mark.parametrize("change", ["class", "order", "fewer"])
def test_other_data_cannot_take_the_place(tmp_path, data, change, inject):
    run = tmp_path / "run"
    Job(f"{FOLDER} data.root={data} run_dir={run} engine.stop_after='2 steps'", tmp_path).ended(0)
    before = list(files(run))
    if change == "fewer":
        next((data / "train" / "digit1").iterdir()).unlink()
    for split in ("train", "test") if change != "fewer" else ():
        (data / split / "digit1").rename(data / split / ("digit9" if change == "order" else "another"))
    inject()
    said = Job(f"resume={run}", tmp_path).ended(2)
    assert "->" in said
    assert ("fingerprint" if change == "fewer" else "class") in said
    assert list(files(run)) == before


def spoil(path: Path, how: str) -> None:
    """Damage an image file."""
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image\n" * 20)
    elif how == "bomb":
        Image.new("1", (20_000, 20_000)).save(path, "PNG")


@pytest.mark.fault(13)
def test_unreadable_images_fail_with_their_path_or_are_replaced(tmp_path, data, draw, inject):
    victims = draw.sample(sorted((data / "train").rglob("*.jpg")), 4)
    for victim, how in zip(victims, ("truncated", "empty", "text", "bomb"), strict=True):
        whole = victim.read_bytes()
        spoil(victim, how)
        inject()
        said = Job(f"{FOLDER} data.root={data} data.workers=0 run_dir={tmp_path / how}", tmp_path).ended(2)
        assert str(victim) in said
        assert "Traceback" not in said
        victim.write_bytes(whole)
    for victim, how in zip(victims, ("truncated", "empty", "text", "bomb"), strict=True):
        spoil(victim, how)
    results = []
    for workers, name in ((0, "a"), (2, "b")):
        command = f"{FOLDER} data.root={data} data.unreadable=quarantine data.workers={workers}"
        said = Job(f"{command} run_dir={tmp_path / name}", tmp_path).ended(0)
        assert "4 training images were replaced" in said
        listed = (tmp_path / name / "unreadable.txt").read_text()
        assert all(str(victim) in listed for victim in victims)
        assert json.loads((tmp_path / name / "result.json").read_text())["unreadable"] == 4
        results.append(result(tmp_path / name))
    inject(4)
    assert results[0] == results[1]
    said = Job(f"{command} data.unreadable_budget=2 run_dir={tmp_path / 'c'}", tmp_path).ended(2)
    assert "data.unreadable_budget=2 allows 2 per rank" in said
    assert "Traceback" not in said


@pytest.mark.fault(12)
@pytest.mark.parametrize("what", ["image", "class", "root"])
def test_data_that_may_not_be_read_are_named(tmp_path, data, what, draw, inject):
    image = draw.choice(sorted((data / "train").rglob("*.jpg")))
    victim = {"image": image, "class": image.parent, "root": data}[what]
    victim.chmod(0)
    try:
        job = Job(f"{FOLDER} data.root={data} run_dir={tmp_path / 'run'}", tmp_path, obedient=True)
        inject()
        said = job.ended(2)
    finally:
        victim.chmod(0o755)
    assert str(victim) in said
    assert "Permission denied" in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) <= 20


@pytest.mark.fault(13)
def test_odd_but_sound_images_are_read(tmp_path, data, inject):
    victims = sorted((data / "train").rglob("*.jpg"))[:4]
    image = Image.open(victims[0])
    image.convert("CMYK").save(victims[0], "JPEG")
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(victims[1], "PNG")
    image.convert("P").save(victims[2], "GIF")
    image.convert("LA").save(victims[3], "PNG")
    inject(4)
    Job(f"{FOLDER} data.root={data} run_dir={tmp_path / 'run'}", tmp_path).ended(0)


@pytest.mark.fault(13)
def test_evaluation_never_replaces_an_image(tmp_path, data, draw, inject):
    run = tmp_path / "run"
    command = f"{FOLDER} data.root={data} data.unreadable=quarantine"
    Job(f"{command} run_dir={run}", tmp_path).ended(0)
    victim = draw.choice(sorted((data / "test").rglob("*.jpg")))
    spoil(victim, draw.choice(["truncated", "empty", "text"]))
    inject()
    said = Job(f"ckpt={run}", tmp_path, module=EVALUATE).ended(2)
    assert str(victim) in said


@pytest.mark.fault(13)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unreadable_validation_image_costs_no_training(tmp_path, data, ranks, inject):
    """All ranks save and exit. Without the file, the run continues, because it was held out of the training images."""
    config, run = DataConfig(name="folder", root=str(data), val_fraction=0.3, hold_out="name"), tmp_path / "run"
    victim = Path(open_split(config, "val").name(0))
    spoil(victim, "truncated")
    inject()
    command = f"{FOLDER} data.root={data} data.val_fraction=0.3 engine.save_every='6 steps' run_dir={run}"
    job = Job(command, tmp_path, ranks=ranks)
    assert str(victim) in job.ended(2)
    assert all(str(victim) in log.read_text() for log in job.logs)
    assert CheckpointStore(run).newest().step == 3
    victim.unlink()
    Job(f"resume={run} engine.stop_after='4 steps'", tmp_path, ranks=ranks).ended(0)


BROKEN = {
    "empty class": lambda root: [path.unlink() for path in (root / "train" / "digit1").iterdir()],
    "empty root": lambda root: shutil.rmtree(root / "train"),
    "other classes": lambda root: (root / "test" / "digit1").rename(root / "test" / "digit7"),
    "missing class": lambda root: shutil.rmtree(root / "test" / "digit1"),
    "no classes": lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()],
}


@pytest.mark.fault(14)
@pytest.mark.parametrize("how", BROKEN)
def test_broken_data_sets_are_refused_before_the_model_is_built(tmp_path, data, how, inject):
    BROKEN[how](data)
    inject()
    said = Job(f"{FOLDER} data.root={data} run_dir={tmp_path / 'run'}", tmp_path).ended(2)
    assert str(data) in said
    assert "Traceback" not in said
    assert "parameters" not in said
    assert len(said.strip().splitlines()) <= 10


@pytest.mark.fault(14)
def test_a_validation_split_is_not_evaluated_once_its_images_have_changed(tmp_path, data, inject):
    """Nor are its images mixed up with those of training: the names of the files decide."""
    run, folder = tmp_path / "run", data / "train" / "digit1"
    Job(f"{FOLDER} data.root={data} data.val_fraction=0.3 run_dir={run}", tmp_path).ended(0)
    assert json.loads((run / "config.json").read_text())["data"]["hold_out"] == "name"
    added = [shutil.copy(next(folder.iterdir()), folder / f"new{number}.jpg") for number in range(6)]
    inject()
    said = Job(f"ckpt={run} split=val", tmp_path, module=EVALUATE).ended(2)
    assert re.search(r"images were added, removed, renamed or relabeled \(digit1: \d+ -> \d+ images\)", said)
    assert "The split val is held out of these images" in said
    Job(f"ckpt={run} split=test", tmp_path, module=EVALUATE).ended(0)
    for path in added:
        path.unlink()
    Job(f"ckpt={run} split=val", tmp_path, module=EVALUATE).ended(0)
    held = json.loads((run / "eval-val.json").read_text())["data"]
    assert held["name"] == "folder/val"
    assert 3 <= held["samples"] <= 20


@pytest.mark.fault(14)
def test_evaluation_takes_the_classes_that_are_there_and_says_where_it_looked(tmp_path, data, inject):
    run = tmp_path / "run"
    Job(f"{FOLDER} data.root={data} run_dir={run}", tmp_path).ended(0)
    whole = json.loads((run / "result.json").read_text())["test"]
    parts = []
    for name in ("digit0", "digit1", "digit2"):
        root = tmp_path / name
        shutil.copytree(data / "test" / name, root / "test" / name)
        inject()
        said = Job(f"ckpt={run} root={root}", tmp_path, module=EVALUATE).ended(0)
        assert "folder/test has no images of 2 of the 3 classes: digit" in said
        parts.append(json.loads((run / "eval-test.json").read_text()))
    for count in ("top1_count", "total"):
        assert sum(part[count] for part in parts) == whole[count]
    (root / "test" / "digit2").rename(root / "test" / "digit3")
    said = Job(f"ckpt={run} root={root}", tmp_path, module=EVALUATE).ended(2)
    assert "the data has 1 (digit3). The model does not know digit3. Set root=" in said
    (tmp_path / "train").mkdir()
    assert f"folder has only train in {tmp_path}." in Job(f"ckpt={run} root=.", tmp_path, module=EVALUATE).ended(2)
    said = Job(f"ckpt={run} root=moved", tmp_path, module=EVALUATE).ended(2)
    assert f"{tmp_path / 'moved'} does not exist. Set root=" in said
    inject(3)


@pytest.mark.fault(13)
def test_names_that_are_not_utf8_are_as_good_as_others(tmp_path, data, inject):
    """In quarantine, in check and as names of classes."""
    for split in ("train", "test"):
        folder = Path(os.fsdecode(os.fsencode(data / split) + b"/digit\xff"))
        (data / split / "digit2").rename(folder)
        whole = sorted(folder.iterdir())[0]
        whole.rename(Path(os.fsdecode(os.fsencode(folder) + b"/\xfe\xe4.jpg")))
    spoiled = Path(os.fsdecode(os.fsencode(data / "train" / "digit1") + b"/\xfd.jpg"))
    spoiled.write_bytes(b"no image")
    run = tmp_path / "run"
    command = f"{FOLDER} data.root={data} data.unreadable=quarantine run_dir={run}"
    inject(2)
    said = Job(command, tmp_path).ended(0)
    assert "1 training images were replaced" in said
    assert "digit1/\\udcfd.jpg: unreadable image" in (run / "unreadable.txt").read_text()
    assert json.loads((run / "result.json").read_text())["unreadable"] == 1
    Job(f"ckpt={run}", tmp_path, module=EVALUATE).ended(0)
    shutil.copy(*(Path(os.fsdecode(os.fsencode(data / "train") + name)) for name in COPIED))
    words = [sys.executable, "-m", "moa_train.cli.data", "check", str(data), "--json", str(tmp_path / "report.json")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 1, done.stderr
    assert "digit1/\\udcfd.jpg: unreadable image" in done.stdout
    assert "/digit\\udcff/\\udcfe\\udce4.jpg\n" in done.stdout
    assert len(json.loads((tmp_path / "report.json").read_text())["duplicates"]) == 1


COPIED = (b"/digit\xff/\xfe\xe4.jpg", b"/digit1/zzz.jpg")


@pytest.mark.fault(14)
def test_stray_files_are_left_out(tmp_path, data, inject):
    (data / "train" / "notes.txt").write_text("x")
    (data / "train" / "digit1" / ".hidden.jpg").write_text("x")
    for path in sorted((data / "train").rglob("*.jpg"))[::3]:
        path.unlink()
    inject()
    assert "26 train" in Job(f"{FOLDER} data.root={data} run_dir={tmp_path / 'run'}", tmp_path).ended(0)


@pytest.mark.fault(14)
def test_fewer_samples_than_a_batch_are_refused_with_sizes_that_fit(tmp_path, data, inject):
    inject()
    said = Job(f"{FOLDER} data.root={data} run_dir={tmp_path / 'run'} engine.batch_size=64", tmp_path).ended(2)
    images = len(list((data / "train").rglob("*.jpg")))
    assert f"engine.batch_size=64, but there are only {images} training images" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


MISTAKES = {
    "optim.lr=-1": "optim.lr",
    "optim.lr=nan": "optim.lr",
    "optim.lr=inf": "optim.lr",
    "optim.lr=fast": "optim.lr",
    "optim.lrr=1": "optim.lr",
    "optim.weight_decay=-0.1": "optim.weight_decay",
    "optim.betas=[0.9]": "optim.betas",
    "optim.betas=[0.9,1.0]": "optim.betas",
    "optim.clip=norn": "norm",
    "optim=adamww": "adamw",
    "engine.batch_size=0": "engine.batch_size",
    "engine.batch_size=-4": "engine.batch_size",
    "engine.batch_size=2.5": "engine.batch_size",
    "engine.batch_size=15": "nearest multiples",
    "engine.ema_decay=1.5": "engine.ema_decay",
    "engine.eval_split=vall": "val",
    "engine.eval_every='3 parsecs'": "engine.eval_every",
    "engine.nonfinite=ignore": "abort",
    "engine.nonfinite_budget=-1": "engine.nonfinite_budget",
    "engin.batch_size=4": "engine.batch_size",
    "data=digitss": "digits",
    "data.workers=-1": "data.workers",
    "data.val_fraction=0.9": "data.val_fraction",
    "data.unreadable=ignore": "quarantine",
    "data.image_size=0": "data.image_size",
    "data.limit=0": "data.limit",
    "model=moa_x": "moa_",
    "model.heads=[3,5]": "heads",
    "model.depths=[]": "depths",
    "model.moa.reduction=0": "model.moa.reduction",
    "model.patch_size=0": "model.patch_size",
    "model.dropout=1.0": "model.dropout",
    "schedule.duration='0 steps'": "schedule.duration",
    "schedule.warmup='200%'": "schedule.warmup",
    "schedule.name=cosin": "cosine",
    "augment.flip=2": "augment.flip",
    "augment.scale=[1,0.5]": "augment.scale",
    "runtime.device=gpu": "cuda",
    "runtime.precision=fp64": "fp32",
    "runtime.timeout=0": "runtime.timeout",
    "resume=nowhere": "nowhere",
    "replay=3": "resume=",
}


@pytest.mark.fault(15)
def test_mistakes_are_named_with_what_would_be_right(tmp_path, draw, inject):
    """Forty of them, four at a time."""
    words = list(MISTAKES)
    for start in range(0, len(words), 4):
        four = words[start : start + 4]
        jobs = [(word, Job(f"{TINY} {word} run_dir={tmp_path / str(words.index(word))}", tmp_path)) for word in four]
        for word, job in jobs:
            inject()
            said = job.ended(2)
            assert MISTAKES[word] in said, word
            assert "Traceback" not in said, word
            assert "parameters" not in said, word
            assert len(said.strip().splitlines()) <= 10, word
    assert not list(tmp_path.rglob("step-*"))


@pytest.mark.fault(7)
def test_no_worker_outlives_its_rank(tmp_path, tree, inject):
    """Processes that read images, of a rank that is killed: gone within seconds."""
    job = Job(
        f"{FOLDER} data.root={tree} data.workers=2 run_dir={tmp_path / 'run'}", tmp_path, faults="step.loss=kill@5"
    )
    group = job.processes[0].pid  # each rank leads a process group of its own
    assert job.codes() == [-9], job.output
    inject()
    wait_for_end(group)


def runs(group: int) -> bool:
    """Return whether a process of a group is running. Zombies are not: process 1 of a container may not reap them."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def wait_for_end(group: int) -> None:
    """Wait until all processes of a group have ended."""
    end = time.monotonic() + 60
    while runs(group):
        assert time.monotonic() < end
        time.sleep(0.1)


def block(image: Path) -> None:
    """Put a pipe in the place of an image, such that opening it blocks. At no time is the file missing."""
    pipe = image.with_suffix(".pipe")
    os.mkfifo(pipe)
    pipe.replace(image)


@pytest.mark.fault(6)
@pytest.mark.parametrize("where", ["workers", "this process", "evaluation"])
def test_a_stop_is_answered_while_storage_hangs(tmp_path, data, where, inject):
    run, split = tmp_path / "run", "test" if where == "evaluation" else "train"
    workers = 0 if where == "this process" else 2
    image = next((data / split / "digit1").iterdir())
    whole = image.read_bytes()
    job = Job(
        f"{FOLDER} data.root={data} data.workers={workers} engine.eval_split=test schedule.duration='900 steps' "
        f"run_dir={run}",
        tmp_path,
    )
    wait_for_step(run, 2)
    block(image)
    logged = -1
    while logged < (logged := len(rows(run))):
        time.sleep(1)
    inject()
    job.signal(signal.SIGTERM)
    assert job.codes(patience=60) == [75], job.output  # a few seconds on an idle machine
    assert CheckpointStore(run).newest().step == rows(run)[-1]["step"]
    image.unlink()
    image.write_bytes(whole)
    Job(f"resume={run} engine.stop_after=1steps", tmp_path).ended(0)


@pytest.mark.fault(6)
@pytest.mark.parametrize("where", ["evaluation", "update"])
def test_two_ranks_stop_while_storage_hangs(tmp_path, data, where, inject):
    """They abandon an evaluation, and nothing is lost. In an update, they end and name the newest checkpoint."""
    command = f"{FOLDER} data.root={data} engine.eval_split=test schedule.duration='900 steps' data.workers=1"
    image = next((data / ("test" if where == "evaluation" else "train") / "digit1").iterdir())
    whole, run = image.read_bytes(), tmp_path / "run"
    job = Job(f"{command} run_dir={run}", tmp_path, ranks=2)
    wait_for_step(run, 2)
    block(image)
    logged = -1
    while logged < (logged := len(rows(run))):
        time.sleep(1.5)
    inject()
    job.signal(signal.SIGTERM)
    codes, newest = job.codes(patience=60), CheckpointStore(run).newest()  # a few seconds on an idle machine
    if where == "update":
        assert 2 in codes, job.output
        assert f"The newest checkpoint is from step {newest.step}." in job.output
        return
    assert codes == [75, 75], job.output
    assert newest.step == rows(run)[-1]["step"]
    image.unlink()
    image.write_bytes(whole)
    Job(f"resume={run} engine.stop_after='{newest.step + 2} steps'", tmp_path, ranks=2).ended(0)
    Job(f"{command} run_dir={tmp_path / 'b'} engine.stop_after='{newest.step + 2} steps'", tmp_path, ranks=2).ended(0)
    assert state_hash(run) == state_hash(tmp_path / "b")


@pytest.mark.fault(6)
def test_two_interrupts_leave_no_worker_that_waits_for_storage(tmp_path, data, inject):
    run = tmp_path / "run"
    job = Job(f"{FOLDER} data.root={data} data.workers=2 schedule.duration='900 steps' run_dir={run}", tmp_path)
    group = job.processes[0].pid
    wait_for_step(run, 2)
    for image in (data / "train" / "digit1").iterdir():
        block(image)
    time.sleep(2)
    inject()
    for _ in range(2):
        os.killpg(group, signal.SIGINT)
        time.sleep(0.2)
    assert job.codes() == [130], job.output
    wait_for_end(group)


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    "own", [("optim.lr=0.001", "optim.lr=0.002"), ("", "engine.ema_decay=0.5"), ("", "runtime.seed=7")]
)
def test_ranks_with_other_configurations_name_the_difference(tmp_path, own, inject):
    job = Job(f"{TINY} run_dir={tmp_path / 'run'}", tmp_path, ranks=2, own=own)
    inject()
    said = job.ended(2)
    assert "The ranks differ in configuration" in said
    assert f"{own[1].split('=')[0]}: " in said
    assert "on rank 0" in said
    assert "on rank 1" in said
    assert not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.fault(16)
@pytest.mark.parametrize("begun", ["no", "on rank 0", "on both ranks"])
def test_ranks_without_a_common_run_folder_do_not_start(tmp_path, whole, whole_pair, begun, inject):
    """On machines without shared storage, which may hold different checkpoints or none."""
    places = [tmp_path / "a", tmp_path / "b"]
    for number, (place, run) in enumerate(zip(places, (whole, whole_pair), strict=True)):
        place.mkdir()
        if number < ["no", "on rank 0", "on both ranks"].index(begun):
            shutil.copytree(run, place / "run", symlinks=True)
    before = list(files(tmp_path))
    job = Job(f"{TINY} run_dir=run resume=auto runtime.timeout=10", tmp_path, ranks=2, places=places)
    inject()
    said = job.ended(2)
    for log in job.logs:
        assert f"run_dir: rank 1 ({socket.gethostname()}) cannot read what rank 0" in log.read_text()
        assert "must be on storage that all machines share" in log.read_text()
    assert "Traceback" not in said
    assert [entry for entry in files(tmp_path) if not entry[0].endswith(".txt")] == before
    assert (places[0] / "run" / ".lock").exists()


@pytest.mark.fault(16)
def test_ranks_with_other_images_say_how_many_each_has(tmp_path, tree, inject):
    """On machines whose copies of the data differ: in a training, and in an evaluation."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        shutil.copytree(tree, place / "data")
    command = f"{FOLDER} data.root=data data.workers=0 run_dir={tmp_path / 'run'}"
    Job(command, tmp_path, ranks=2, places=places).ended(0)
    for split in ("train", "test"):
        next((places[1] / "data" / split / "digit1").iterdir()).unlink()
    inject(2)
    job = Job(command.replace("/run", "/other"), tmp_path, ranks=2, places=places)
    said = job.ended(2)
    assert "The ranks differ in their images" in said
    assert "train.images: 40 on rank 0; 39 on rank 1" in job.logs[1].read_text()
    assert not list((tmp_path / "other").rglob("step-*"))
    said = Job(f"ckpt={tmp_path / 'run'}", tmp_path, ranks=2, places=places, module=EVALUATE).ended(2)
    assert "test.images: 61 on rank 0; 60 on rank 1" in said
    assert "Every machine needs the same data" in said


@pytest.mark.fault(16)
def test_ranks_with_other_predictions_of_a_teacher_do_not_start(tmp_path, tree, inject):
    places = [tmp_path / "a", tmp_path / "b"]
    source = open_split(DataConfig(name="folder", root=str(tree), image_size=16), "train")
    rank, top = np.zeros_like(source.labels), source.labels[:, None]
    for certainty, place in zip((0.9, 0.8), places, strict=True):
        (place / "teacher").mkdir(parents=True)
        logs = np.full(len(source), np.log(certainty), np.float32)
        outcomes = Outcomes.of(source, source.labels, rank, logs, top, logs[:, None])
        outcomes.write(place / "teacher" / "predictions-train.npz")
    inject()
    command = f"{FOLDER} data.root={tree} distill.teachers=[teacher] run_dir={tmp_path / 'run'}"
    said = Job(command, tmp_path, ranks=2, places=places).ended(2)
    assert "The ranks differ in the predictions of distill.teachers" in said
    assert not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.fault(17)
def test_of_two_runs_on_one_folder_one_goes_on(tmp_path, whole, inject):
    run = tmp_path / "run"
    jobs = [Job(f"{TINY} run_dir={run}", tmp_path, faults="step.loss=sleep@2")]
    jobs.append(Job(f"{TINY} run_dir={run}", tmp_path / "..", faults="step.loss=sleep@2"))
    inject()
    codes = sorted(job.codes()[0] for job in jobs)
    said = "".join(job.output for job in jobs)
    assert codes == [0, 2], said
    assert "is in use by" in said or "already holds a run" in said
    assert result(run) == result(whole)


@pytest.mark.fault(17)
@pytest.mark.parametrize("content", ["", '{"pid": 1, "host": "elsewhere", "since": "now", "command": "x"}', "\0"])
def test_a_stale_lock_is_no_lock(tmp_path, content, inject):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text(content)
    inject()
    Job(f"{TINY} run_dir={run} engine.stop_after='1 steps'", tmp_path).ended(0)


@pytest.mark.fault(19)
def test_evaluation_is_exact_on_any_number_of_ranks_and_workers(tmp_path, tree, inject):
    run = tmp_path / "run"
    Job(f"{FOLDER} data.root={tree} run_dir={run}", tmp_path).ended(0)
    seen = []
    for ranks in (1, 2):
        for workers in (0, 2):
            output = tmp_path / f"{ranks}-{workers}.json"
            command = f"ckpt={run} batch_size=8 workers={workers} output={output}"
            Job(command, tmp_path, ranks=ranks, module=EVALUATE).ended(0)
            inject()
            seen.append(json.loads(output.read_text()))
    assert {(found["top1_count"], found["top5_count"], found["total"]) for found in seen} == {
        (seen[0]["top1_count"], seen[0]["top5_count"], 61)
    }


def test_every_checkpoint_says_what_made_it(tmp_path, whole):
    said = Job(f"ckpt={whole} command=true", tmp_path, module=EVALUATE).ended(0)
    assert f"-m {TRAIN} data=digits" in said
    assert f"run_dir={whole}" in said
    assert "from step 0 on 1 rank(s): moa-train" in said


@pytest.mark.fault(14)
def test_values_of_environment_variables_are_in_no_record(tmp_path, data, inject):
    """Records hold the expression, and a resume reads the variable again."""
    root, run = data.rename(tmp_path / "zebra7"), tmp_path / "run"
    start = [*arguments(f"{FOLDER} run_dir={run} engine.stop_after='3 steps'")]
    start.append(f"data.root={tmp_path}/${{oc.env:MOA_PLACE}}")
    inject()
    for words, place in ((start, root), ([f"resume={run}", "data.workers=0"], root.rename(tmp_path / "okapi8"))):
        if not place.exists():
            place.symlink_to(tmp_path / "okapi8")
        done = subprocess.run(
            [sys.executable, "-m", TRAIN, *words],
            env={**os.environ, "MOA_PLACE": place.name, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    for path, content in files(run):
        assert b"zebra7" not in content, path
        assert b"okapi8" not in content, path
    expression = f"{tmp_path}/${{oc.env:MOA_PLACE}}"
    assert json.loads((run / "config.json").read_text())["data"]["root"] == expression
    assert CheckpointStore(run).newest().state["config"]["data"]["root"] == expression
