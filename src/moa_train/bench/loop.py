"""Compare the trainer with a bare loop: the difference is the cost of logging, checkpoints and the rest of the loop.

A real run, with TensorBoard and background checkpoints, alternates with a bare loop over the same batches, transform,
model and optimizer. Both run within one `Trainer.fit`: when the trainer requests the first batch of a measurement, the
bare loop runs first.
"""

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_train.assembly.checks import check_config
from moa_train.assembly.inputs import open_splits
from moa_train.assembly.run import Run, build_run
from moa_train.assembly.training import build_compiled
from moa_train.bench import plain
from moa_train.bench.job import Job
from moa_train.bench.tables import Row, Table
from moa_train.bench.timing import synchronize
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.runtime.signals import StopSignals
from moa_train.schema import RunConfig


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check the configuration and the data, and return the function that yields one table."""
    # Each measurement has a save in its middle, so that it includes the background work of this save.
    config = training(job.config, steps=job.steps // 2 + job.rounds * job.steps + 1)
    config.engine.save_every = f"{job.steps} steps"
    check_config(config)
    open_splits(config, Distributed(job.device))
    Precision.resolve(config.runtime.precision, job.device)
    return lambda: iter([_compare(job, config)])


def training(config: RunConfig, steps: int) -> RunConfig:
    """Return the configuration of a run of ``steps`` typical steps, without evaluation."""
    config = copy.deepcopy(config)
    config.run_dir = config.resume = config.replay = config.init = config.engine.stop_after = None
    config.schedule.duration, config.schedule.warmup, config.augment.weak_for = f"{steps} steps", "0%", "0%"
    config.engine.eval_split, config.engine.ema_decay = "none", 0.0
    config.runtime.threads = torch.get_num_threads()  # a number that follows the load would differ between candidates
    config.tracking.progress, config.tracking.profile_steps = "plain", 0
    return config


def before_each_step(run: Run, action: Callable[[int], None]) -> None:
    """Make the trainer call ``action(step)`` before it loads the first batch of each step."""

    def batches(start_step: int) -> Iterator[Any]:
        loaded = run.loader.batches(start_step)
        for step in count(start_step):
            action(step)
            for _ in range(run.trainer.train_step.micro_batches):
                yield next(loaded)

    run.trainer.train_batches = batches


def _compare(job: Job, config: RunConfig) -> Table:
    device = job.device
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = build_run(config, run_dir=Path(folder), distributed=Distributed(job.device), stop=StopSignals())
        bare, first, started = BareLoop(run), job.steps // 2, 0.0
        seconds: dict[str, list[float]] = {"trainer": [], "bare": []}

        def take_turn(step: int) -> None:
            nonlocal started
            if step < first or (step - first) % job.steps:
                return
            run.trainer.store.wait()
            synchronize(device)
            if step == first:
                bare(first)  # warmup
            else:
                seconds["trainer"].append(time.perf_counter() - started)
                begun = time.perf_counter()
                bare(job.steps)
                seconds["bare"].append(time.perf_counter() - begun)
            started = time.perf_counter()

        before_each_step(run, take_turn)
        run.trainer.fit()
        run.trainer.tracker.close()
    rows = [Row(name, "ms", [1e3 * value / job.steps for value in taken]) for name, taken in seconds.items()]
    batch = f"batch {config.engine.batch_size} = {bare.passes} x {config.engine.micro_batch_size}"
    title = (
        f"{config.model.title}, {config.data.name}, {bare.precision.name}, {batch}, {job.steps} steps per measurement"
    )
    saves = f"one save per measurement, a log row every {config.tracking.log_every} steps"
    return Table("loop", f"{title}, {saves}", [*rows, rows[0].over(rows[1])])


class BareLoop:
    """A hand-written loop over a run's batches, transform and clipping, with copies of its model and optimizer."""

    def __init__(self, run: Run) -> None:
        self.run, step = run, run.trainer.train_step
        model, self.optimizer = copy.deepcopy((run.model, run.trainer.state.optimizer))
        self.device, self.passes = run.trainer.distributed.device, step.micro_batches
        self.model = build_compiled(run.config, model, run.trainer.plan.total_steps, self.device)
        self.precision = run.trainer.state.precision
        self.transform, self.clip = step.transform, step.clip
        self.batches = run.loader.batches(0)

    def __call__(self, steps: int) -> None:
        """Run ``steps`` updates and wait for the device."""
        for _ in range(steps):
            plain.update(
                self.model, self.optimizer, self._inputs(), passes=self.passes, precision=self.precision, clip=self.clip
            )
        synchronize(self.device)

    def _inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.passes):
            batch = next(self.batches).to(self.device, non_blocking=True)
            yield self.transform(batch, batch.step)
