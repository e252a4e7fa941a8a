"""Compare the number of threads that follows the load with fixed numbers, next to 0, 1 and 2 busy processes.

One real training runs through all situations. In each one, it first adapts for `SETTLE` seconds; then the adaptive
number, one thread and all threads alternate.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch

from moa_train.assembly.inputs import open_splits
from moa_train.assembly.run import Run, build_run
from moa_train.assembly.validation import check_config
from moa_train.bench.job import Job
from moa_train.bench.loop import before_each_step, training
from moa_train.bench.tables import Row, Table
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopSignals
from moa_train.schema import RunConfig

SETTLE = 10.0
"""Seconds from the start of a situation to its first measurement."""
BUSY = (0, 1, 2)
"""Numbers of busy processes."""
TURN = 4.0
"""Shortest duration of a measurement in seconds."""
MANY = 10**6
"""More steps than a measurement takes."""


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check the configuration and the data, and return the function that yields a table per situation."""
    if torch.get_num_threads() < 2 or job.device.type != "cpu":
        raise UserError("The part load compares numbers of threads on a CPU, so it requires at least two of them.")
    config = training(job.config, steps=MANY)
    config.engine.save_every, config.tracking.loggers, config.runtime.threads = config.schedule.duration, [], "auto"
    check_config(config)
    open_splits(config, job.alone)
    return lambda: _measure(job, config)


class _Done(Exception):  # noqa: N818 it is no error
    """Raised to leave the training."""


def _measure(job: Job, config: RunConfig) -> Iterator[Table]:
    seconds: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = build_run(config, run_dir=Path(folder), distributed=job.alone, stop=StopSignals())
        director = _direct(job, run, seconds)
        next(director)
        before_each_step(run, director.send)
        with contextlib.suppress(_Done):
            run.trainer.fit()
        run.trainer.tracker.close()
    where = f"{config.model.title}, {config.data.name}, batch {config.engine.batch_size}"
    for busy, taken in seconds.items():
        rows = [Row.rate(name, values, config.engine.batch_size) for name, values in taken.items()]
        best = max(rows[1:], key=lambda row: row.median)
        yield Table("load", f"{where}, next to {busy} busy process(es)", [*rows, rows[0].over(best)])


def _direct(job: Job, run: Run, results: dict[int, dict[str, list[float]]]) -> Generator[None, int, None]:
    """Go through all situations, one step at a time, and add the seconds per step to ``results``."""
    threads = run.trainer.threads
    step = yield
    for busy in BUSY:
        ways = {"adaptive": None, "1 thread": 1, f"{threads.most} threads": threads.most}
        results[busy] = {name: [] for name in ways}
        with busy_processes(busy):
            end = time.perf_counter() + SETTLE
            while time.perf_counter() < end:
                step = yield
            for _ in range(job.rounds):
                for name, number in ways.items():
                    threads.pin(number)
                    step = yield  # the first step with another number is a warmup
                    first, started = step, time.perf_counter()
                    while time.perf_counter() - started < TURN or step == first:
                        step = yield
                    results[busy][name].append((time.perf_counter() - started) / (step - first))
            threads.pin(None)
    raise _Done


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep ``count`` processes busy, each with one core."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
