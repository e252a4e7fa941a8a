"""Compare the number of threads that follows the load with fixed numbers, next to 0, 1 and 2 busy processes.

One real training runs through all changes between these situations. After each change, it adapts for `SETTLE` seconds;
then the adaptive number, one thread and all threads are measured in turn.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from moa_train.assembly.checks import check_config
from moa_train.assembly.inputs import open_splits
from moa_train.assembly.run import Run, build_run
from moa_train.bench.job import Job
from moa_train.bench.loop import before_each_step, training
from moa_train.bench.tables import Row, Table
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopSignals
from moa_train.schema import RunConfig

BUSY = (0, 1, 2, 0, 2, 1, 0)
"""Numbers of busy processes in order: every change between 0, 1 and 2."""
LEAD = 3.0
"""Seconds for which the number of threads adapts before each change, after it was fixed."""
SETTLE = 10.0
"""Seconds from a change to the first measurement."""
TURN = 4.0
"""Shortest duration of a measurement in seconds."""
ENOUGH = 0.9
"""Share of the speed of the best number of threads that makes another number good enough."""
BUSY_LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:  # ends also if moa-bench is killed
    sum(range(10**6))
"""
MANY = 10**6
"""More steps than a measurement takes."""


@dataclass
class Change:
    """What was measured after a change of the number of busy processes.

    Attributes:
        before: number of busy processes before the change.
        after: the same after it.
        chosen: the chosen number of threads at each adaptive step, with the seconds since the change.
        seconds: seconds per step by candidate.
    """

    before: int
    after: int
    chosen: list[tuple[float, int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def settled(self, good: set[int]) -> float:
        """Return the seconds after which the chosen number was always one of ``good``."""
        wrong = [elapsed for elapsed, number in self.chosen if number not in good]
        return wrong[-1] if wrong else 0.0


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check the configuration and the data, and return the function that yields the tables."""
    if torch.get_num_threads() < 2 or job.device.type != "cpu":
        raise UserError("The part load compares numbers of threads on a CPU, so it requires at least two of them.")
    config = training(job.config, steps=MANY)
    config.engine.save_every, config.tracking.loggers, config.runtime.threads = config.schedule.duration, [], "auto"
    check_config(config)
    open_splits(config, Distributed(job.device))
    return lambda: _measure(job, config)


class _Done(Exception):  # noqa: N818 it is no error
    """Raised to leave the training."""


def _measure(job: Job, config: RunConfig) -> Iterator[Table]:
    changes: list[Change] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = build_run(config, run_dir=Path(folder), distributed=Distributed(job.device), stop=StopSignals())
        director = _direct(job, run, changes)
        next(director)
        before_each_step(run, director.send)
        with contextlib.suppress(_Done):
            run.trainer.fit()
        run.trainer.tracker.close()
    where = f"{config.model.title}, {config.data.name}, batch {config.engine.batch_size}"
    good: dict[int, set[int]] = {}
    for busy in sorted(set(BUSY)):
        found = [change.seconds for change in changes if change.after == busy]
        rows = [Row.rate(name, [seconds[name] for seconds in found], config.engine.batch_size) for name in found[0]]
        best = max(rows[1:], key=lambda row: row.median)
        good[busy] = {int(row.what.split()[0]) for row in rows[1:] if row.median >= ENOUGH * best.median}
        yield Table("load", f"{where}, next to {busy} busy process(es)", [*rows, rows[0].over(best)])
    kinds = dict.fromkeys((change.before, change.after) for change in changes)
    rows = [
        Row(
            f"from {before} to {after} busy",
            "s",
            [change.settled(good[after]) for change in changes if (change.before, change.after) == (before, after)],
        )
        for before, after in kinds
    ]
    yield Table("load", f"{where}, seconds until the number of threads has followed a change", rows)


def _direct(job: Job, run: Run, changes: list[Change]) -> Generator[None, int, None]:
    """Go through all situations, one step at a time, and add to ``changes`` what was measured."""
    threads = run.trainer.threads
    ways = {"adaptive": None, "1 thread": 1, f"{threads.most} threads": threads.most}
    step = yield
    with busy_processes() as keep_busy:
        for before, after in list(pairwise(BUSY)) * ((job.rounds + 1) // 2):  # measures each situation twice
            started = time.perf_counter()
            while time.perf_counter() - started < LEAD:
                step = yield
            change = Change(before, after)
            changes.append(change)
            keep_busy(after)
            started = time.perf_counter()
            while time.perf_counter() - started < SETTLE:
                step = yield
                change.chosen.append((time.perf_counter() - started, threads.counts["train"]))
            for name, number in ways.items():
                if number is not None:
                    threads.pin(number)
                    step = yield  # the first step with another number is a warmup
                first, turn = step, time.perf_counter()
                while time.perf_counter() - turn < TURN or step == first:
                    step = yield
                    if number is None:
                        change.chosen.append((time.perf_counter() - started, threads.counts["train"]))
                change.seconds[name] = (time.perf_counter() - turn) / (step - first)
            threads.pin(None)
    raise _Done


@contextlib.contextmanager
def busy_processes() -> Iterator[Callable[[int], None]]:
    """Yield a function that starts or stops processes until a number of them is busy, each with one core."""
    processes: list[subprocess.Popen[bytes]] = []

    def keep_busy(count: int) -> None:
        while len(processes) < count:
            processes.append(subprocess.Popen([sys.executable, "-c", BUSY_LOOP]))
        while len(processes) > count:
            process = processes.pop()
            process.kill()
            process.wait()

    try:
        yield keep_busy
    finally:
        keep_busy(0)
