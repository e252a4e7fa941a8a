"""Check a run before it starts: every problem at once, and what a few real steps say about time, memory and disk."""

import copy
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moa_train.assembly.checks import check_batch_size, check_config, check_same_data, fill_micro_batch_size
from moa_train.assembly.evaluation import build_validation
from moa_train.assembly.inputs import open_splits
from moa_train.assembly.process import set_up_process
from moa_train.assembly.run import Run, build_run
from moa_train.assembly.run_dir import check_shared
from moa_train.assembly.timeline import build_schedule
from moa_train.assembly.training import build_state
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.find_weights import find_weights
from moa_train.engine.state import check_form
from moa_train.optim.scaling import explain_lr
from moa_train.plugins import LOGGERS
from moa_train.runtime.device import peak_memory
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError, check_all
from moa_train.runtime.precision import Precision
from moa_train.runtime.signals import Exit, StopSignals
from moa_train.schema import RunConfig
from moa_train.tracking.chart import chart
from moa_train.tracking.console import block, clock_time
from moa_train.tracking.tracker import Tracker

BUDGET = 5.0
"""Seconds for the steps that are timed, after the first one."""
MOST_STEPS = 20
EVALUATED = 1024
"""Images per rank of the evaluation that is timed."""


def preflight(config: RunConfig, stop: StopSignals) -> int:
    """Make a few real steps, an evaluation and a checkpoint, report on them, and return the exit code.

    Everything is written to a temporary folder next to the run folder, on the same storage.

    Raises:
        UserError: the run would fail. The message lists all problems that were found.
    """
    with Distributed.start(config.runtime.device, config.runtime.timeout) as distributed:
        set_up_process(config.runtime, distributed)
        with scratch_folder(config, distributed) as folder:
            quiet = copy.deepcopy(config)
            quiet.init = config.init if config.resume in (None, "auto") else None
            quiet.tracking = replace(config.tracking, loggers=[], images=0, profile_steps=0, progress="plain")
            build = partial(build_run, quiet, run_dir=folder, distributed=distributed, stop=stop)
            try:
                everywhere(
                    distributed, lambda: check_all(partial(LOGGERS.load, name) for name in config.tracking.loggers)
                )
                run = build()
            except UserError as error:
                # If the cause is on this rank only, the others are still building, and would not answer.
                list_problems(config, distributed, error)
                raise
            try:
                text = report(config, run, folder, distributed)
            finally:
                run.trainer.tracker.close()
    if distributed.is_main:
        print(text)
    return Exit.FINISHED


@contextmanager
def scratch_folder(config: RunConfig, distributed: Distributed) -> Iterator[Path]:
    """Yield a new folder on the storage of the run folder, and remove it in the end."""
    wanted = Path(config.run_dir or "outputs").absolute()
    place = next(path for path in wanted.parents if path.exists())

    def create() -> str:
        try:
            return tempfile.mkdtemp(prefix=".preflight-", dir=place)
        except OSError as error:
            raise UserError(
                f"The run folder cannot be created in {place}: {error.strerror}. Choose another run_dir."
            ) from error

    path = Path(distributed.on_main(create))
    try:
        check_shared(path, distributed, config.runtime.timeout)
        yield path
    finally:
        if distributed.is_main:
            shutil.rmtree(path, ignore_errors=True)


def everywhere(distributed: Distributed, check: Callable[[], object]) -> None:
    """Run a check on every rank, and raise the same `UserError` on all of them if it fails on any."""
    message = ""
    try:
        check()
    except UserError as error:
        message = str(error)
    found = distributed.gather_objects(message)
    lines = dict.fromkeys(
        text if message == text or found.count(text) == len(found) else f"rank {rank}: {text}"
        for rank, text in enumerate(found)
        if text
    )
    if lines:
        raise UserError("\n".join(lines))


def list_problems(config: RunConfig, distributed: Distributed, first: UserError) -> None:
    """Repeat the steps of building a run independently of each other, to find the problems behind the first one."""
    config = copy.deepcopy(config)
    found: dict[str, Any] = {}

    def known() -> None:
        raise first

    def data() -> None:
        found["sources"] = open_splits(replace(config, data=replace(config.data, download=False)), distributed)[0]

    def length() -> None:
        if "sources" in found:
            images = len(found["sources"]["train"])
            check_all(
                [
                    lambda: check_batch_size(config, images),
                    lambda: build_schedule(config, images * config.augment.repeats),
                ]
            )

    def model() -> None:
        precision = Precision.resolve(config.runtime.precision, distributed.device)
        classes = len(found["sources"]["train"].classes) if "sources" in found else 10
        build_state(config, classes, config.optim.lr, precision, fresh="sources" in found)

    def init() -> None:
        if config.init and not config.init.endswith((".pth", ".pt")):
            find_weights(Path(config.init))

    resolving, checking = partial(fill_micro_batch_size, config, distributed), partial(check_config, config)
    check_all([known, resolving, checking, data, length, init, model])


def report(config: RunConfig, run: Run, folder: Path, distributed: Distributed) -> str:
    """Try out a run, and return a report.

    Raises:
        UserError: the run would fail.
    """
    trainer, plan = run.trainer, run.trainer.plan
    first = trainer.state.step
    if config.resume is not None and (before := CheckpointStore(Path(config.run_dir or "")).newest()) is not None:
        check_same_data(check_form(before), trainer.record)
        trainer.state.restore(before, distributed.rank)
        first = before.step
    steps = max(plan.stop_step - first, 0)
    starting, step = time_steps(run, distributed) if steps else (0.0, 0.0)
    per_image = time_evaluation(run, distributed)
    size, saving = time_checkpoint(run, folder, distributed)
    memory = max(distributed.gather_objects(peak_memory(distributed.device)))

    validation = len(run.sources[trainer.eval_split]) if trainer.eval_split != "none" else 0
    final = len(run.sources[run.final_split]) if run.final_split != "none" else 0
    interval = plan.evaluate.steps
    evaluations = (plan.stop_step // interval - first // interval if interval else 0) if validation else 0
    evaluations += bool(validation) and plan.stop_step == plan.total_steps and not plan.evaluate.due(plan.stop_step)
    training, evaluating = starting + steps * step, per_image * (evaluations * validation + final)
    total = training + evaluating
    kept = config.engine.keep_last + bool(validation) + (plan.total_steps // plan.keep.steps if plan.keep.steps else 0)
    needed, free = size * (int(kept) + 1), shutil.disk_usage(folder).free
    room = total_memory(distributed)
    problems = []
    if needed > free:
        problems.append(
            f"The checkpoints need {_bytes(needed)} ({int(kept)} of {_bytes(size)}, and one being written), but the "
            f"storage of {config.run_dir or 'outputs'} has {_bytes(free)} free. Lower engine.keep_last, use a larger "
            "engine.keep_every, or choose another run_dir."
        )
    if memory > room:
        problems.append(
            f"A rank needs {_bytes(memory)} of memory, and there are {_bytes(room)} for each. Set "
            "engine.micro_batch_size to a smaller divisor of engine.batch_size, or model.checkpointing=true."
        )
    if problems:
        raise UserError("\n".join(problems))
    batch = config.engine.batch_size
    rows = {
        "model": f"{config.model.title}, {sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters",
        "data": ", ".join(f"{len(source):,} {split}" for split, source in run.sources.items()) + " images",
        "device": f"{distributed.device}, {distributed.world_size} rank(s), {trainer.state.precision.name}",
        "lr": f"{config.optim.name} {explain_lr(batch, config.optim)}; {trainer.schedule.describe()}",
        "best by": f"{trainer.best_by} on {trainer.eval_split}" if validation else "no evaluation during training",
        "steps": f"{steps:,} of {step:.3g} s ({batch / step:,.0f} images/s); the first one took {starting:.3g} s"
        if step
        else "none left",
        "evaluations": f"{int(evaluations)} of {clock_time(per_image * validation)} each, and the final one",
        "checkpoint": f"{_bytes(size)}, written in {saving:.2g} s in the background and read back",
        "memory": f"{_bytes(memory)} of {_bytes(room)} for each rank",
        "disk": f"{_bytes(needed)} of {_bytes(free)} free: {int(kept)} checkpoints, and one being written",
        "time": f"about {clock_time(total)}: {clock_time(training)} of steps, {clock_time(evaluating)} of evaluation",
        "end": time.strftime("%A, %Y-%m-%d %H:%M", time.localtime(time.time() + total)) + ", if it starts now",
    }
    points = sorted({round(number) for number in np.linspace(0, plan.total_steps, 400)})
    curve = [(number, trainer.schedule.lr(number)) for number in points]
    marks = chart({"lr": curve}, height=10, x_label="steps")
    last = "No problems were found. To start the run, use the same command without preflight."
    return "\n\n".join([block("preflight", rows), groups(run), f"learning rate\n{marks}", last])


def time_steps(run: Run, distributed: Distributed) -> tuple[float, float]:
    """Make some updates, and return the seconds of the first one and of one of the others.

    Raises:
        UserError: the loss is not finite.
    """
    trainer = run.trainer
    batches = trainer.train_batches(trainer.state.step)

    def update(count: int) -> float:
        began, values = time.perf_counter(), None
        for _ in range(count):
            trainer.state.optimizer.set_lr(trainer.schedule.lr(trainer.state.step))
            values = trainer.train_step(batches, trainer.state.step)
            assert values is not None  # nothing requests a stop
            trainer.state.meters.add(values)
            trainer.state.step += 1
        assert values is not None
        loss = distributed.mean(float(values["loss"]))  # waits for the device
        if not math.isfinite(loss):
            raise UserError(f"The loss of step {trainer.state.step} is {loss}. Lower optim.lr, or use a longer warmup.")
        return max(distributed.gather_objects(time.perf_counter() - began)) / count

    first, second = update(1), update(1)
    return first, update(min(max(int(BUDGET / second), 1), MOST_STEPS))


def time_evaluation(run: Run, distributed: Distributed) -> float:
    """Evaluate a part of the validation split, or else of the test split, and return the seconds per image."""
    trainer, config = run.trainer, run.config
    split = trainer.eval_split if trainer.eval_split != "none" else run.final_split
    if split == "none":
        return 0.0
    source = run.sources[split]
    count = min(EVALUATED * distributed.world_size, len(source))
    part = source.subset(np.linspace(0, len(source) - 1, count).astype(np.int64), split)
    began = time.perf_counter()
    result = build_validation(config, part, trainer.state, distributed, lambda: False, Tracker(), trainer.threads)()
    assert result is not None
    return max(distributed.gather_objects(time.perf_counter() - began)) / count


def time_checkpoint(run: Run, folder: Path, distributed: Distributed) -> tuple[int, float]:
    """Save a checkpoint, restore it on every rank, and return its bytes and the seconds that writing it took."""
    trainer, began = run.trainer, time.perf_counter()
    trainer.save()
    trainer.store.close()
    distributed.barrier()
    seconds = time.perf_counter() - began

    def restore() -> None:
        trainer.state.restore(CheckpointStore(folder).at(trainer.state.step), distributed.rank)

    everywhere(distributed, restore)
    saved = CheckpointStore(folder).at(trainer.state.step)
    return sum(size for size, _ in saved.files.values()), seconds


def total_memory(distributed: Distributed) -> int:
    """Return the memory in bytes that each rank may use: of its GPU, or its share of the machine's."""
    if distributed.device.type == "cuda":
        return int(torch.cuda.get_device_properties(distributed.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // distributed.local_world_size


def groups(run: Run) -> str:
    """Return a table of the parameter groups."""
    lines = [
        "parameter groups",
        f"  {'optimizer':14}{'group':10}{'lr':>10}{'decay':>8}{'tensors':>9}{'parameters':>13}",
    ]
    for part in run.trainer.state.optimizer.parts:
        for group in part.param_groups:
            count = sum(parameter.numel() for parameter in group["params"])
            lr = run.trainer.schedule.peak * group["lr_scale"]
            lines.append(
                f"  {type(part).__name__:14}{group.get('name', ''):10}{lr:>10.3g}{group['weight_decay']:>8.3g}"
                f"{len(group['params']):>9}{count:>13,}"
            )
    return "\n".join(lines)


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
