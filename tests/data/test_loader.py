import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.data import loader
from moa_train.data.dataset import open_split
from moa_train.data.file_source import FileSource
from moa_train.data.image import EncodedImage
from moa_train.data.loader import EvalLoader, TrainLoader
from moa_train.data.order import Order
from moa_train.data.source import Source
from moa_train.data.tree import scan
from moa_train.data.view import CenterCrop, RandomResizedCrop
from moa_train.interfaces import Batch
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopRequestedError
from moa_train.schema import DataConfig

STEPS = 4
QUARANTINE = DataConfig(unreadable="quarantine")


@pytest.fixture
def files(make_tree: Callable[..., Path]) -> FileSource:
    return FileSource("folder/train", scan(make_tree(splits=("train",), per_class=5) / "train"), (24, 20))


@pytest.fixture
def digits() -> Source:
    return open_split(DataConfig(name="digits", image_size=16), "train")


def train(
    source: Source,
    batch_size: int = 6,
    micro: int = 3,
    seed: int = 0,
    crop: str = "resized",
    config: DataConfig | None = None,
    **settings: Any,
) -> TrainLoader:
    size, order = source.image_size, Order(len(source), batch_size, seed)
    view = RandomResizedCrop(size, (0.08, 1.0), (3 / 4, 4 / 3)) if crop == "resized" else CenterCrop(size, 1.0)
    return TrainLoader(source, config or DataConfig(), order=order, view=view, micro_batch_size=micro, **settings)


def contents(batches: list[Batch]) -> list[tuple[object, ...]]:
    return [
        (b.step, b.micro, b.images.numpy().tobytes(), b.labels.tolist(), b.index.tolist(), b.epoch.tolist())
        for b in batches
    ]


def first(source: TrainLoader, count: int = 2 * STEPS, start: int = 0) -> list[Batch]:
    return list(islice(source.batches(start), count))


@pytest.mark.parametrize("crop", ["resized", "none"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(files: FileSource, workers: int, crop: str) -> None:
    expected = contents(first(train(files, crop=crop)))
    assert contents(first(train(files, crop=crop, workers=workers))) == expected


def test_any_step_can_be_the_first(files: FileSource, digits: Source) -> None:
    for source in (files, digits):
        expected = contents(first(train(source)))
        assert contents(first(train(source), 4, start=2)) == expected[4:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_sees(files: FileSource, digits: Source, world_size: int) -> None:
    for source in (files, digits):
        alone = contents(first(train(source, 8, 2), 4 * STEPS))
        ranks = [
            first(train(source, 8, 2, rank=rank, world_size=world_size), 4 * STEPS // world_size)
            for rank in range(world_size)
        ]
        together = sorted((batch for rank in ranks for batch in rank), key=lambda batch: (batch.step, batch.micro))
        assert contents(together) == alone


def test_batches_hold_the_images_they_name(files: FileSource, digits: Source) -> None:
    batch = first(train(digits))[3]
    assert (batch.step, batch.micro, len(batch)) == (1, 1, 3)
    assert batch.images.shape == (3, 3, 16, 16)
    assert torch.equal(batch.images, digits.gather(batch.index.numpy()))  # type: ignore[union-attr]
    assert batch.labels.tolist() == digits.labels[batch.index.numpy()].tolist()
    for read in first(train(files, crop="none")):
        for image, index in zip(read.images, read.index.tolist(), strict=True):
            alone = CenterCrop((24, 20), 1.0)(EncodedImage(Path(files.name(index)).read_bytes()), np.empty(0))
            assert torch.equal(image, alone)


def test_seed_and_epoch_change_crops(files: FileSource) -> None:
    def crops(seed: int, start: int) -> dict[int, bytes]:
        batches = first(train(files, len(files), len(files), seed), 1, start)
        return {int(i): image.numpy().tobytes() for b in batches for i, image in zip(b.index, b.images, strict=True)}

    one = crops(0, 0)
    for other in (crops(1, 0), crops(0, 1)):
        assert one.keys() == other.keys()
        assert all(one[index] != other[index] for index in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(files: FileSource, workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first(train(files, workers=workers))
    list(EvalLoader(files, batch_size=4, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (1, 2), (3, 1)])
def test_evaluation_sees_every_sample_once_in_chunks_of_fixed_composition(
    files: FileSource, digits: Source, world_size: int, workers: int
) -> None:
    for source, size in ((files, 4), (digits, 100)):
        loaders = [
            EvalLoader(source, batch_size=size, rank=rank, world_size=world_size, workers=workers)
            for rank in range(world_size)
        ]
        chunks = [list(loader) for loader in loaders]
        assert [len(loader) for loader in loaders] == [len(chunk) for chunk in chunks]
        for rank, batches in enumerate(chunks):
            assert [batch.step % world_size for batch in batches] == [rank] * len(batches)
        everything = sorted((batch for rank in chunks for batch in rank), key=lambda batch: batch.step)
        assert contents(everything) == contents(list(EvalLoader(source, batch_size=size)))
        assert torch.cat([batch.index for batch in everything]).tolist() == list(range(len(source)))


def test_more_ranks_than_chunks(files: FileSource) -> None:
    idle = EvalLoader(files, batch_size=100, rank=1, world_size=2, workers=2)
    assert len(idle) == 0
    assert list(idle) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_fail_with_their_path(files: FileSource, workers: int) -> None:
    Path(files.name(7)).write_bytes(b"no image")
    for batches in (train(files, workers=workers).batches(), iter(EvalLoader(files, batch_size=4, workers=workers))):
        with pytest.raises(UserError) as error:
            list(islice(batches, 100))
        assert str(error.value).startswith(f"{files.name(7)}: unreadable image")
        assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_quarantine_substitutes_the_next_readable_file(
    files: FileSource, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    sound = first(train(files, crop="none"), 10)
    for bad in (7, 8):
        Path(files.name(bad)).write_bytes(b"no image")
    quarantine = train(files, crop="none", config=QUARANTINE, workers=workers)
    batches = first(quarantine, 10)
    substitute = {7: 9, 8: 9}
    for before, after in zip(sound, batches, strict=True):
        index = [substitute.get(index, index) for index in before.index.tolist()]
        assert after.index.tolist() == index
        assert after.labels.tolist() == files.labels[index].tolist()
    assert len(quarantine.quarantined) == len(caplog.messages) == 2  # each file is reported once
    assert "Replaced unreadable image 1 of at most 100" in caplog.text


def test_quarantine_has_a_budget(files: FileSource) -> None:
    for bad in (1, 5, 9):
        Path(files.name(bad)).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3 images are unreadable; data\.unreadable_budget=2 allows 2 per rank"):
        first(train(files, config=DataConfig(unreadable="quarantine", unreadable_budget=2)), 20)


def test_a_data_set_without_readable_images_is_an_error(files: FileSource) -> None:
    for index in range(len(files)):
        Path(files.name(index)).write_bytes(b"no image")
    with pytest.raises(UserError, match="in a row are unreadable"):
        first(train(files, config=QUARANTINE), 20)


def workers_of(process: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            children += map(int, (task / "children").read_text().split())
    return children


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_POLL", 0.3)
    monkeypatch.setattr(loader, "_STOP_PATIENCE", 3.0)


@pytest.mark.usefixtures("impatient")
def test_a_killed_worker_is_an_error_at_the_next_batch(files: FileSource) -> None:
    before = set(workers_of(os.getpid()))
    batches = train(files, workers=1).batches()
    next(batches)
    (worker,) = set(workers_of(os.getpid())) - before
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.2)  # no exception here: the trainer could be saving
    with pytest.raises(UserError, match=r"A worker process that reads images failed: .*exited unexpectedly.* memory"):
        list(islice(batches, 1000))


@pytest.mark.usefixtures("impatient")
def test_storage_that_hangs_is_an_error_in_bounded_time(files: FileSource) -> None:
    before = set(workers_of(os.getpid()))
    hang(Path(files.name(7)))
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"No images could be read for 1 s: the storage hangs"):
            first(train(files, workers=workers, timeout=1.0), 100)
    deadline = time.monotonic() + 60
    while set(workers_of(os.getpid())) - before:
        assert time.monotonic() < deadline
        active_children()  # also reaps dead processes


def test_shared_memory_that_is_too_small_is_named_at_once(files: FileSource) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    batches = train(files, workers=1).batches()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # also of files in /dev/shm
    try:
        with pytest.raises(UserError, match=r"in shared memory \(.*\)\. /dev/shm has .*--shm-size=8g.*data.workers=0"):
            next(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("impatient")
def test_a_stop_ends_the_wait_for_storage_that_hangs(files: FileSource, workers: int) -> None:
    hang(Path(files.name(7)))
    asked = threading.Event()
    threading.Timer(0.5, asked.set).start()
    with pytest.raises(StopRequestedError):
        first(train(files, workers=workers, stop=asked.is_set), 100)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.usefixtures("impatient")
def test_slow_storage_is_waited_for(files: FileSource, stop: bool) -> None:
    """A stop waits as well, because ranks on GPUs cannot abandon an update that another rank waits for."""
    expected = contents(first(train(files, len(files), len(files)), 1))
    path = Path(files.name(7))
    whole = path.with_name("whole")
    whole.write_bytes(path.read_bytes())
    hang(path)

    def answer() -> None:
        with path.open("wb") as pipe:
            pipe.write(whole.read_bytes())
            whole.replace(path)  # before the next epoch asks for it

    timer = threading.Timer(0.9, answer)
    timer.daemon = True  # it would wait forever for a loader that gave up
    timer.start()
    assert contents(first(train(files, len(files), len(files), workers=1, stop=lambda: stop), 1)) == expected


def hang(path: Path) -> None:
    """Put a pipe in the place of a file: opening it blocks until another process writes to it."""
    path.unlink()
    os.mkfifo(path)


SCRIPT = """
import signal, sys, time
from pathlib import Path
from moa_train.data.file_source import FileSource
from moa_train.data.loader import TrainLoader
from moa_train.data.order import Order
from moa_train.data.tree import scan
from moa_train.data.view import RandomResizedCrop
from moa_train.schema import DataConfig

for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), lambda number, frame: print("signal", number, flush=True))
source = FileSource("x", scan(Path(sys.argv[1])), (24, 24))
order, view = Order(len(source), 4, 0), RandomResizedCrop((24, 24), (0.08, 1.0), (3 / 4, 4 / 3))
batches = TrainLoader(source, DataConfig(), order=order, view=view, micro_batch_size=4, workers=2).batches()
next(batches)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(50):
    next(batches)
print("alive", flush=True)
# exit with the loader still open
"""


@pytest.fixture
def trainer(files: FileSource) -> Iterator["subprocess.Popen[str]"]:
    """A process that has read its first batch with two workers, and continues after a line of input."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(files.tree.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_signals_to_all_processes_reach_the_trainer_only(trainer: "subprocess.Popen[str]") -> None:
    assert trainer.stdout is not None
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.killpg(trainer.pid, number)
        assert trainer.stdout.readline() == f"signal {int(number)}\n"
    output, _ = trainer.communicate("continue\n", timeout=20)  # exiting with an open loader does not hang
    assert output == "alive\n"
    assert trainer.returncode == 0


def test_workers_do_not_outlive_a_killed_trainer(trainer: "subprocess.Popen[str]") -> None:
    workers = workers_of(trainer.pid)
    assert len(workers) == 2
    trainer.kill()
    deadline = time.monotonic() + 60
    while any(runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def runs(process: int) -> bool:
    """Return whether a process is running. A zombie is not: process 1 of a container may not reap it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches(files: FileSource, digits: Source, workers: int) -> None:
    for source in (files, digits):
        batch = first(train(source, workers=workers, pin_memory=True), 1)[0]
        assert batch.images.is_pinned()
        there = batch.to("cuda", non_blocking=True)
        assert there.images.is_cuda
        assert there.labels.is_cuda
        assert not there.index.is_cuda


def test_gray_and_tall_images_fit_in(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L", (5, 90), 99).save(tmp_path / "a" / "1.png")
    Image.new("RGB", (90, 5), (1, 2, 3)).save(tmp_path / "a" / "2.png")
    source = FileSource("x", scan(tmp_path), (24, 20))
    for crop in ("resized", "none"):
        for batch in first(train(source, 2, 2, crop=crop), 3):
            values = batch.images[batch.index == 0]
            assert (values == 99).all()
