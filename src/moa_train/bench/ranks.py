"""Compare several processes with one, launched as real trainings.

On CPUs, N processes are compared with one process that has the same total number of threads and the same batch. On
CUDA, every process has a GPU and its share of the batch, and N processes are compared with N times one process.
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from moa_train.assembly.checks import check_config
from moa_train.assembly.inputs import open_splits
from moa_train.assembly.process import set_up_process
from moa_train.assembly.run import build_run
from moa_train.bench.job import Job
from moa_train.bench.loop import before_each_step, training
from moa_train.bench.tables import Row, Table
from moa_train.bench.timing import alternate, synchronize
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopSignals
from moa_train.schema import RunConfig, thread_count
from moa_train.serialization import from_dict, to_dict

WARMUP = 5
"""Steps before the measurement starts."""


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check that the threads or GPUs and the batch can be shared, and return the function that yields one table."""
    ranks, batch = job.ranks, job.config.engine.batch_size
    cuda = job.device.type == "cuda"
    shared = torch.cuda.device_count() if cuda else thread_count(job.config.runtime.threads) or torch.get_num_threads()
    if shared < ranks:
        raise UserError(
            f"--ranks {ranks} requires as many {'GPUs' if cuda else 'CPU threads'}, but there are only {shared}."
        )
    if batch % ranks:
        raise UserError(f"engine.batch_size={batch} is not a multiple of --ranks {ranks}. Change one of the two.")
    config = training(job.config, steps=WARMUP + job.steps + 1)
    config.engine.micro_batch_size, config.engine.save_every = batch // ranks, config.schedule.duration
    config.tracking.loggers = []
    check_config(config)
    open_splits(config, Distributed(job.device))
    alone = copy.deepcopy(config)
    if cuda:
        config.runtime.device, alone.engine.batch_size = "cuda", batch // ranks
    else:
        alone.engine.micro_batch_size = batch
        alone.runtime.threads, config.runtime.threads = shared, shared // ranks
    return lambda: iter([_compare(job, config, alone)])


def _compare(job: Job, config: RunConfig, alone: RunConfig) -> Table:
    seconds = alternate(
        {"ranks": lambda: launch(config, job.ranks, job.steps), "one": lambda: launch(alone, 1, job.steps)}, job.rounds
    )
    cuda = job.device.type == "cuda"
    several = Row.rate(f"{job.ranks} processes", seconds["ranks"], job.steps * config.engine.batch_size)
    one = Row.rate("N x one process" if cuda else "one process", seconds["one"], job.steps * config.engine.batch_size)
    each = "a GPU each" if cuda else f"{config.runtime.threads} of {alone.runtime.threads} threads each"
    batch = f"batch {config.engine.batch_size}, {job.steps} steps per measurement"
    title = f"{config.model.title}, {config.data.name}, {each}, {batch}"
    return Table("ranks", title, [several, one, several.over(one)])


def launch(config: RunConfig, ranks: int, steps: int) -> float:
    """Train in ``ranks`` new processes and return the seconds that ``steps`` steps take after the warmup."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *torchrun, "-m", __name__, name, str(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{ranks} process(es) failed:\n{done.stdout.decode(errors='replace')[-4000:]}")
        return float((folder / "seconds").read_text())


def worker(folder: Path, steps: int) -> None:
    """Train as one of the processes."""
    config: RunConfig = from_dict(json.loads((folder / "config.json").read_text()))
    with Distributed.start(config.runtime.device, config.runtime.timeout) as distributed:
        set_up_process(config.runtime, distributed)
        run = build_run(config, run_dir=folder, distributed=distributed, stop=StopSignals())
        marks: list[float] = []

        def mark(step: int) -> None:
            if step in (WARMUP, WARMUP + steps):
                synchronize(distributed.device)
                distributed.barrier()
                marks.append(time.perf_counter())

        before_each_step(run, mark)
        run.trainer.fit()
        if distributed.is_main:
            (folder / "seconds").write_text(str(marks[1] - marks[0]))


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]))
