"""A training run."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from moa_train.assembly.checks import (
    check_batch_size,
    check_config,
    fill_micro_batch_size,
    training_record,
)
from moa_train.assembly.choices import Choices, apply, choose
from moa_train.assembly.commands import command
from moa_train.assembly.evaluation import build_validation, measurement
from moa_train.assembly.inputs import build_train_loader, check_same_images, open_splits, open_teachers
from moa_train.assembly.pictures import show_inputs
from moa_train.assembly.process import adaptive_threads
from moa_train.assembly.restore import replace_lost_best, reset_best, restore
from moa_train.assembly.timeline import build_plan, build_schedule
from moa_train.assembly.training import build_state, build_train_step
from moa_train.data.loader import TrainLoader
from moa_train.data.source import Source
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.metrics import create_metrics
from moa_train.engine.nonfinite import NonFinitePolicy, RollBack
from moa_train.engine.plan import Plan
from moa_train.engine.ratios import UpdateRatios
from moa_train.engine.trainer import Trainer
from moa_train.plugins import LOGGERS, short_name
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.runtime.signals import StopSignals
from moa_train.schema import RunConfig
from moa_train.serialization import to_dict
from moa_train.tracking.tracker import Tracker, open_tracker


@dataclass
class Run:
    """All objects of a training run, ready to start."""

    config: RunConfig
    trainer: Trainer
    model: nn.Module
    sources: dict[str, Source]
    final_split: str
    """The split that the finished run reports: test if it exists, otherwise the validation split or "none"."""
    loader: TrainLoader
    choices: Choices


def build_run(
    config: RunConfig,
    *,
    run_dir: Path,
    distributed: Distributed,
    stop: StopSignals,
    origin: dict[str, Any] | None = None,
    rolled_back: RollBack | None = None,
    origins: list[dict[str, Any]] | None = None,
) -> Run:
    """Build everything, cheapest checks first, and restore the newest checkpoint of ``run_dir`` if there is one.

    Args:
        config: the configuration; ``micro_batch_size`` is filled in. With ``config.replay``, the checkpoint is the
            newest one that is not past that step, and nothing is written.
        run_dir: the run folder, which exists.
        distributed: the ranks.
        stop: the stop signals.
        origin: provenance of this start (command, code); checkpoints hold the origins of all starts.
        rolled_back: the rollback because of which the run is rebuilt, if any.
        origins: the origins of all starts including this one, if the run is rebuilt.
    """
    fill_micro_batch_size(config, distributed)
    check_config(config)
    precision = Precision.resolve(config.runtime.precision, distributed.device)

    sources, choice = open_splits(config, distributed)
    check_same_images(sources, distributed)
    train = sources["train"]
    check_batch_size(config, len(train))
    teachers = open_teachers(config, train, distributed)

    length = len(train) * config.augment.repeats
    schedule, to_steps = build_schedule(config, length)
    plan = build_plan(config, schedule.total_steps, length, to_steps)
    weak_from = plan.total_steps - round(to_steps(config.augment.weak_for, "augment.weak_for"))

    store = CheckpointStore(run_dir, keep_last=config.engine.keep_last, keep=plan.keep.due)
    # Rank 0 selects the checkpoint for all ranks.
    newest = distributed.on_main(lambda: getattr(store.newest(until=config.replay), "step", None))
    # With a checkpoint, the initial weights are no longer needed, and their file may be gone.
    classes = train.classes
    said: list[str] = []
    state = build_state(
        config, len(classes), schedule.peak, precision, fresh=newest is None, classes=classes, say=said.append
    )
    recorded = store.at(newest).state.get("choices") if newest is not None else None
    choices = Choices(
        **distributed.on_main(lambda: choose(config, state, train, recorded, distributed.local_world_size).as_dict())
    )
    record: dict[str, Any] = {"config": to_dict(config), "choices": choices.as_dict(), **training_record(train)}
    record["teachers"] = teachers.fingerprint if teachers else None
    record["measured"] = measurement(config, choice, sources)
    starts: list[dict[str, Any]] = []
    restarted = lost = None
    if newest is not None:
        starts, before = restore(state, store.at(newest), record, distributed)
        restarted = reset_best(state, before, record["measured"], sources)
        if config.replay is None and state.step < plan.total_steps:
            lost = replace_lost_best(state, store, distributed)
    if rolled_back is not None:
        state.nonfinite, state.lr_factor = rolled_back.nonfinite, rolled_back.lr_factor
    this_start = {**(origin or {}), "first_step": state.step, "ranks": distributed.world_size}
    record["origin"] = origins or [*starts, this_start]

    config = apply(choices, config, state)
    threads = adaptive_threads(config.runtime, distributed)
    loader = build_train_loader(config, train, distributed, lambda: stop.requested)
    train_step = build_train_step(
        config,
        train,
        state,
        weak_from=weak_from,
        total_steps=plan.total_steps,
        distributed=distributed,
        teachers=teachers,
    )
    tracker = Tracker()
    if config.replay is None:
        tracker = _build_tracker(config, run_dir, plan, state.step, distributed, remeasured=restarted is not None)
    threads.say = tracker.say
    for message in filter(None, (*said, restarted, lost)):
        tracker.say(message)
    if state.step == 0 and config.tracking.images and distributed.is_main:
        show_inputs(train_step, tracker, config, train.classes)
    if config.tracking.ratios:
        train_step.ratios = UpdateRatios(state.model, plan.log.due)
    validation = None
    if choice != "none":
        validation = build_validation(
            config, sources[choice], state, distributed, lambda: stop.requested, tracker, threads
        )

    engine, best_by = config.engine, short_name(config.engine.best_by)
    trainer = Trainer(
        state=state,
        plan=plan,
        schedule=schedule,
        train_step=train_step,
        train_batches=loader.batches,
        evaluate=validation,
        eval_split=choice,
        best_by=best_by,
        higher_is_better=create_metrics(engine)[best_by].higher_is_better,
        batch_size=engine.batch_size,
        store=store,
        tracker=tracker,
        nonfinite=NonFinitePolicy(
            engine.nonfinite,
            engine.nonfinite_budget,
            engine.rollback_lr_factor,
            run_dir,
            distributed,
            command("moa-train", config, resume=run_dir),
        ),
        stop=stop,
        distributed=distributed,
        record=record,
        threads=threads,
        rolled_back=rolled_back is not None,
        metadata={"format": "1", **{name: json.dumps(value) for name, value in record.items()}},
    )
    return Run(config, trainer, state.model, sources, "test" if "test" in sources else choice, loader, choices)


def _build_tracker(
    config: RunConfig, run_dir: Path, plan: Plan, step: int, distributed: Distributed, *, remeasured: bool
) -> Tracker:
    settings = config.tracking
    return open_tracker(
        run_dir,
        total_steps=plan.stop_step,
        steps_per_epoch=plan.steps_per_epoch,
        is_main=distributed.is_main,
        resumed_step=step,
        progress=settings.progress,
        loggers=[
            partial(LOGGERS.create, name, settings.args.get(short_name(name), {}), f"tracking.args.{short_name(name)}")
            for name in settings.loggers
        ],
        config=to_dict(config),
        profile_steps=settings.profile_steps,
        remeasured=remeasured,
    )
