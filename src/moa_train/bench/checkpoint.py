"""Measure checkpoints of the configured model: how long training waits for a save, and the times to save and restore.

A full save writes, flushes and verifies the files and removes older checkpoints, in the background; torch.save only
writes and flushes.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch

from moa_train.assembly.training import build_state
from moa_train.bench import plain
from moa_train.bench.job import Job
from moa_train.bench.tables import Row, Table
from moa_train.bench.timing import Measure, alternate, synchronize
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.state import TrainState
from moa_train.runtime.precision import Precision
from moa_train.schema import image_shape

LR = 1e-6


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check the precision, and return the function that yields one table."""
    precision = Precision.resolve(job.config.runtime.precision, job.device)
    return lambda: iter([_measure(job, precision)])


def _measure(job: Job, precision: Precision) -> Table:
    config, device = job.config, job.device
    state = build_state(config, job.num_classes, LR, precision, fresh=False)
    images = torch.randn(2, 3, *image_shape(config.data.image_size), device=device)
    targets = torch.full((2, job.num_classes), 1 / job.num_classes, device=device)
    inputs = [(images, targets)]  # one update creates the optimizer state to save
    plain.update(state.model, state.optimizer, inputs, passes=1, precision=precision, clip=lambda parameters: None)
    with tempfile.TemporaryDirectory() as folder, CheckpointStore(Path(folder)) as store:
        seconds = alternate(_measures(state, store, device), job.rounds)
        newest = store.newest()
        assert newest is not None
        size = sum(path.stat().st_size for path in newest.path.iterdir())
    rows = [Row(name, "ms", [1e3 * value for value in taken]) for name, taken in seconds.items()]
    waits, full, *_, theirs = rows
    title = f"{config.model.title}, {config.optim.name}, {size / 2**20:.1f} MiB of files, in the page cache"
    return Table("checkpoint", title, [*rows, waits.over(theirs), full.over(theirs)])


def _measures(state: TrainState, store: CheckpointStore, device: torch.device) -> dict[str, Measure]:
    steps = count(1)

    def save() -> None:
        step = next(steps)
        record = {"train": {**state.scalars(), "meters": [state.meters.state_dict()]}}
        store.save(step, state.tensors(), record, background=True)

    def measure(work: Callable[[], object], after: Callable[[], object] = lambda: None) -> Measure:
        def once() -> float:
            synchronize(device)
            started = time.perf_counter()
            work()
            seconds = time.perf_counter() - started
            after()
            return seconds

        once()  # warmup
        return once

    def save_and_wait() -> None:
        save()
        store.wait()

    def restore() -> None:
        newest = store.newest()
        assert newest is not None
        state.restore(newest)
        synchronize(device)

    def torch_save() -> None:
        with (store.directory.parent / "torch.pt").open("wb") as file:
            torch.save([state.model.state_dict(), [part.state_dict() for part in state.optimizer.parts]], file)
            file.flush()
            os.fsync(file.fileno())

    return {
        "training waits": measure(save, after=store.wait),
        "full save": measure(save_and_wait),
        "find and verify": measure(store.newest),
        "restore": measure(restore),
        "torch.save": measure(torch_save),
    }
