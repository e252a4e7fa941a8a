"""A training run."""

import json
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from torch import nn

from moa_train.build.check import check_batch_size, check_config, check_same_data, resolve
from moa_train.build.data import build_normalize, build_train_loader, open_splits
from moa_train.build.evaluation import build_validation
from moa_train.build.model import model_fields
from moa_train.build.schedule import build_plan, build_schedule
from moa_train.build.state import build_state, build_train_step
from moa_train.data import Source, TrainLoader
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.manifest import Checkpoint
from moa_train.engine.nonfinite import NonFinitePolicy
from moa_train.engine.plan import Plan
from moa_train.engine.state import TrainState, check_form
from moa_train.engine.step import TrainStep
from moa_train.engine.trainer import Trainer
from moa_train.model import check_model
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.runtime.signals import StopSignals
from moa_train.schema import RunConfig, to_dict
from moa_train.tracking.tracker import Tracker, open_tracker

LOGGERS = {
    "tensorboard": "moa_train.tracking.tensorboard:TensorBoard",
    "csv": "moa_train.tracking.csv_file:CsvFile",
    "wandb": "moa_train.tracking.wandb:WandB",
}


@dataclass
class Run:
    """Everything of a training run, ready to go."""

    config: RunConfig
    trainer: Trainer
    model: nn.Module
    sources: dict[str, Source]
    final_split: str
    """What the finished run is judged on: test, where there is one, or what chose the best, or nothing ("none")."""
    loader: TrainLoader


def build_run(
    config: RunConfig,
    *,
    run_dir: Path,
    distributed: Distributed,
    stop: StopSignals,
    origin: dict[str, Any] | None = None,
) -> Run:
    """Build everything, cheapest checks first, and restore the newest checkpoint of ``run_dir`` where there is one.

    ``origin`` says where this start comes from (command, code); checkpoints carry those of all starts. With
    ``config.replay`` the checkpoint is the newest one that is not past that step, and nothing is written.
    """
    resolve(config, distributed)
    check_config(config)
    precision = Precision.resolve(config.runtime.precision, distributed.device)

    sources, choice = open_splits(config, distributed)
    train = sources["train"]
    check_model(config.model.name, **model_fields(config.model, config.data, len(train.classes)))
    check_batch_size(config, len(train))
    loader = build_train_loader(config, train, distributed)

    length = len(train) * config.augment.repeats
    schedule, distance = build_schedule(config, length)
    plan = build_plan(config, schedule.total_steps, length, distance)
    off_step = plan.total_steps - round(distance(config.augment.off, "augment.off"))

    store = CheckpointStore(run_dir, keep_last=config.engine.keep_last, keep=plan.keep.due)
    # Chosen by rank 0, the same everywhere.
    newest = distributed.on_main(lambda: getattr(store.newest(until=config.replay), "step", None))
    # Initial weights have done their part when there is a checkpoint, and may be gone.
    state = build_state(config, len(train.classes), schedule.peak, precision, config.init if newest is None else None)
    record: dict[str, Any] = {"config": to_dict(config), "classes": train.classes, "fingerprint": train.fingerprint}
    starts = [] if newest is None else _resume(state, store.at(newest), record, distributed)
    record["origin"] = [*starts, {**(origin or {}), "first_step": state.step, "ranks": distributed.world_size}]

    train_step = build_train_step(config, train, state, off_step, distributed)
    tracker = Tracker() if config.replay is not None else _build_tracker(config, run_dir, plan, state.step, distributed)
    if state.step == 0 and config.tracking.images and distributed.is_main:
        _show_inputs(train_step, tracker, config)
    validation = None
    if choice != "none":
        validation = build_validation(config, sources[choice], state, distributed, lambda: stop.requested)

    engine = config.engine
    trainer = Trainer(
        state=state,
        plan=plan,
        schedule=schedule,
        train_step=train_step,
        train_batches=loader.batches,
        evaluate=validation,
        eval_split=choice,
        batch_size=engine.batch_size,
        store=store,
        tracker=tracker,
        nonfinite=NonFinitePolicy(
            engine.nonfinite, engine.nonfinite_budget, engine.rollback_rate, run_dir, distributed
        ),
        stop=stop,
        distributed=distributed,
        record=record,
        metadata={"format": "1", **{name: json.dumps(record[name]) for name in ("config", "classes", "origin")}},
    )
    return Run(config, trainer, state.model, sources, "test" if "test" in sources else choice, loader)


def _resume(
    state: TrainState, checkpoint: Checkpoint, record: dict[str, Any], distributed: Distributed
) -> list[dict[str, Any]]:
    """Take over what a checkpoint holds, if it is of these data; return the starts that led to it."""
    distributed.check_same(f"the files of {checkpoint.path}", checkpoint.digest)
    before = check_form(checkpoint)
    check_same_data(before, record)
    state.restore(checkpoint, distributed.rank)
    starts: list[dict[str, Any]] = before["origin"]
    return starts


def _show_inputs(train_step: TrainStep, tracker: Tracker, config: RunConfig) -> None:
    """Log some images of the first batch as the model sees them."""
    normalize, shown = build_normalize(config.data), config.tracking.images
    train_step.on_inputs = lambda images: tracker.log_images(0, normalize.undo(images[:shown]))


def _build_tracker(config: RunConfig, run_dir: Path, plan: Plan, step: int, distributed: Distributed) -> Tracker:
    return open_tracker(
        run_dir,
        total_steps=plan.stop_step,
        steps_per_epoch=plan.steps_per_epoch,
        is_main=distributed.is_main,
        resumed_step=step,
        progress=config.tracking.progress,
        loggers=[resolve_name(LOGGERS.get(name, name)) for name in config.tracking.loggers],
        config=to_dict(config),
        profile_steps=config.tracking.profile_steps,
    )
