"""Composition root: from a configuration to the objects of a run, by plain keyword arguments."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from moa_train.data import (
    STATISTICS,
    Batch,
    BatchAugment,
    EvalLoader,
    Mixer,
    Normalize,
    Order,
    Source,
    TrainLoader,
    open_source,
)
from moa_train.data.datasets import has_split
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.evaluate import Evaluation, evaluate
from moa_train.engine.nonfinite import NonFinitePolicy
from moa_train.engine.plan import Cadence, Plan
from moa_train.engine.state import TrainState
from moa_train.engine.step import TrainStep
from moa_train.engine.trainer import Trainer
from moa_train.engine.weights import find_weights
from moa_train.model import check_model, create_model
from moa_train.model.weights import load_weights
from moa_train.optim import (
    AveragedWeights,
    Duration,
    Schedule,
    check_clip,
    clip_gradients,
    create_optimizer,
    scale_rate,
)
from moa_train.runtime.device import available_cores, set_threads
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision, set_fp32_products
from moa_train.runtime.seed import seed_everything, set_deterministic
from moa_train.runtime.signals import StopSignals
from moa_train.schema import DataConfig, ModelConfig, RunConfig, RuntimeConfig, ScheduleConfig, image_shape, to_dict
from moa_train.tracking.tracker import Tracker, open_tracker


def build_runtime(config: RuntimeConfig, distributed: Distributed) -> None:
    """Set what is global to a process: threads, number formats, determinism, seeds."""
    set_threads(config.threads, distributed.local_world_size)
    set_fp32_products(config.matmul)
    set_deterministic(config.deterministic)
    seed_everything(config.seed)


def build_source(config: DataConfig, split: str) -> Source:
    """Open one split of the data set."""
    source = open_source(
        config.name,
        split=split,
        image_size=image_shape(config.image_size),
        root=config.root,
        val_fraction=config.val_fraction,
        download=config.download,
    )
    if split == "train" and config.limit and config.limit < len(source):
        # Evenly spaced: the samples of a folder come class by class.
        return source.subset(np.linspace(0, len(source) - 1, config.limit).astype(np.int64), f"{config.name}/part")
    return source


def model_fields(config: ModelConfig, data: DataConfig, num_classes: int) -> dict[str, Any]:
    """Return the arguments of ``create_model`` and ``check_model``."""
    return {
        "image_size": image_shape(data.image_size),
        "num_classes": num_classes,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depths": tuple(config.depths),
        "heads": tuple(config.heads),
        "window": config.window,
        "mlp_ratio": config.mlp_ratio,
        "dropout": config.dropout,
        "drop_path": config.drop_path,
        "checkpointing": config.checkpointing,
        "moa_enabled": config.moa.enabled,
        "moa_form": config.moa.form,
        "moa_overlap": config.moa.overlap,
        "moa_reduction": config.moa.reduction,
        "moa_drop_path": config.moa.drop_path,
    }


def build_model(config: ModelConfig, data: DataConfig, num_classes: int) -> nn.Module:
    """Build the model, freshly initialised, on the CPU."""
    return create_model(config.name, **model_fields(config, data, num_classes))


def statistics(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the channel means and deviations that images are normalised with."""
    known = STATISTICS[config.name]
    return tuple(config.mean or known.mean), tuple(config.std or known.std)


def workers(config: DataConfig, distributed: Distributed) -> int:
    """Return how many processes a rank decodes files with."""
    if config.workers is not None:
        return config.workers
    return min(8, max(1, available_cores() // distributed.local_world_size))


def build_evaluation(
    config: RunConfig, source: Source, distributed: Distributed, stop: Callable[[], bool] = lambda: False
) -> Callable[[nn.Module], Evaluation | None]:
    """Return a function that evaluates a model on ``source``."""
    loader = EvalLoader(
        source,
        batch_size=config.engine.eval_batch_size,
        rank=distributed.rank,
        world_size=distributed.world_size,
        workers=workers(config.data, distributed),
        crop_ratio=config.data.eval_crop,
        pin_memory=distributed.device.type == "cuda",
    )
    normalize = Normalize(*statistics(config.data))
    precision = Precision.resolve(config.runtime.eval_precision, distributed.device)

    def transform(batch: Batch) -> Tensor:
        return _layout(normalize(batch.images), config.runtime.channels_last)

    return partial(
        evaluate,
        batches=loader,
        transform=transform,
        autocast=precision.autocast,
        distributed=distributed,
        stop=stop,
    )


def build_schedule(config: RunConfig, length: int) -> tuple[Schedule, Callable[[str | None, str], Fraction]]:
    """Return the schedule of the rate, and a function that converts a duration of this run to steps."""
    batch_size = config.engine.batch_size
    total = Duration.parse(config.schedule.duration, what="schedule.duration", allow_zero=False).steps(
        batch_size, length
    )

    def distance(text: str | None, what: str) -> Fraction:
        return Duration.parse(text or "0", what=what).distance(batch_size, length, total)

    def rate(base: float) -> float:
        return scale_rate(base, batch_size, config.optim.lr_batch, config.optim.lr_scaling)

    shape: ScheduleConfig = config.schedule
    schedule = Schedule(
        kind=shape.name,
        peak=rate(config.optim.lr),
        total_steps=total,
        floor=rate(shape.min_lr),
        warmup_start=rate(shape.warmup_lr),
        warmup_steps=round(distance(shape.warmup, "schedule.warmup")),
        milestones=tuple(round(distance(mark, "schedule.milestones")) for mark in shape.milestones),
        gamma=shape.gamma,
    )
    return schedule, distance


def build_plan(config: RunConfig, total_steps: int, length: int, distance: Callable[..., Fraction]) -> Plan:
    """Return what is due when."""
    engine = config.engine
    stop = -(-distance(engine.stop_after, "engine.stop_after") // 1) if engine.stop_after else total_steps
    return Plan(
        total_steps=total_steps,
        steps_per_epoch=Fraction(length, engine.batch_size),
        log=Cadence(Fraction(config.tracking.log_every)),
        evaluate=Cadence(distance(engine.eval_every, "engine.eval_every")),
        save=Cadence(distance(engine.save_every, "engine.save_every")),
        keep=Cadence(distance(engine.keep_every, "engine.keep_every")),
        stop_step=max(1, min(int(stop), total_steps)),
    )


def build_transform(config: RunConfig, source: Source, off_step: int) -> Callable[[Batch, int], tuple[Tensor, Tensor]]:
    """Return the function from a batch on the device to images and target distributions.

    From step ``off_step`` on, strong augmentation and mixing are off.
    """
    settings, seed = config.augment, config.runtime.seed
    mean, std = statistics(config.data)
    augment = BatchAugment(
        seed=seed,
        mean=mean,
        std=std,
        # Files were cropped when they were read: their crop is finer than the pixels that arrive here.
        crop="none" if settings.crop == "resized" and not source.in_memory else settings.crop,
        padding=settings.padding,
        scale=(settings.scale[0], settings.scale[1]),
        ratio=(settings.ratio[0], settings.ratio[1]),
        flip=settings.flip,
        randaugment_ops=settings.randaugment_ops,
        randaugment_magnitude=settings.randaugment_magnitude,
        randaugment_std=settings.randaugment_std,
        color_jitter=settings.color_jitter,
        erasing=settings.erasing,
    )
    mixer = Mixer(
        num_classes=len(source.classes),
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        prob=settings.mix_prob,
        switch_prob=settings.mix_switch_prob,
        smoothing=settings.label_smoothing,
    )

    def transform(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        strong = step < off_step
        images, targets = mixer(augment(batch, strong), batch.labels, (seed, step, batch.micro), strong)
        return _layout(images, config.runtime.channels_last), targets

    return transform


def _layout(images: Tensor, channels_last: bool) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


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


def resolve(config: RunConfig, distributed: Distributed) -> RunConfig:
    """Fill in what depends on the number of ranks, and what a stored run must not ask again."""
    engine = config.engine
    if engine.micro_batch_size is None:
        if engine.batch_size % distributed.world_size:
            raise UserError(
                f"engine.batch_size={engine.batch_size} cannot be shared by {distributed.world_size} ranks. Nearest: "
                f"{round(engine.batch_size / distributed.world_size) * distributed.world_size}."
            )
        engine.micro_batch_size = engine.batch_size // distributed.world_size
    return config


def open_splits(config: RunConfig) -> tuple[dict[str, Source], str]:
    """Open the splits that there are, and name the one that chooses the best checkpoint (or "none")."""
    data, choice = config.data, config.engine.eval_split
    known = [split for split in ("train", "val", "test") if has_split(data.name, split, data.root, data.val_fraction)]
    sources = {split: build_source(data, split) for split in {"train": None, **dict.fromkeys(known)}}
    if "val" in sources and not len(sources["val"]):  # so few images a class that the fraction holds out none
        del sources["val"]
    if choice == "auto":
        choice = "val" if "val" in sources else "none"
    if choice not in (*sources, "none"):
        raise UserError(
            f"engine.eval_split={choice}, but {data.name} has only {', '.join(sources)}. Hold out a larger part of "
            f"train (data.val_fraction={data.val_fraction}) or choose another split."
        )
    return sources, choice


def check_config(config: RunConfig) -> None:
    """Check what can be known before the data is opened, which may take minutes: durations, clipping, the model.

    Raises:
        UserError: naming the key.
    """
    check_clip(config.optim.clip, config.optim.clip_value)
    # Of some data set; errors that depend on its length come when it is known.
    schedule, engine = config.schedule, config.engine
    Duration.parse(schedule.duration, what="schedule.duration", allow_zero=False)
    for what, texts in (
        ("schedule.warmup", [schedule.warmup]),
        ("schedule.milestones", schedule.milestones),
        ("augment.off", [config.augment.off]),
        ("engine.eval_every", [engine.eval_every]),
        ("engine.save_every", [engine.save_every]),
        ("engine.keep_every", [engine.keep_every]),
        ("engine.stop_after", [engine.stop_after]),
    ):
        for text in texts:
            Duration.parse(text or "0", what=what)
    check_model(config.model.name, **model_fields(config.model, config.data, num_classes=2))


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
    engine, augmentation, device = config.engine, config.augment, distributed.device
    precision = Precision.resolve(config.runtime.precision, device)
    sources, choice = open_splits(config)
    train = sources["train"]
    length = len(train) * config.augment.repeats
    check_model(config.model.name, **model_fields(config.model, config.data, len(train.classes)))
    order = Order(len(train), engine.batch_size, config.runtime.seed, repeats=config.augment.repeats)
    loader = TrainLoader(
        train,
        order=order,
        micro_batch_size=engine.micro_batch_size or engine.batch_size,
        rank=distributed.rank,
        world_size=distributed.world_size,
        workers=workers(config.data, distributed),
        crop=augmentation.crop,
        scale=(augmentation.scale[0], augmentation.scale[1]),
        ratio=(augmentation.ratio[0], augmentation.ratio[1]),
        interpolation=augmentation.interpolation,
        unreadable=config.data.unreadable,
        quarantine_budget=config.data.unreadable_budget,
        pin_memory=device.type == "cuda",
    )
    schedule, distance = build_schedule(config, length)
    plan = build_plan(config, schedule.total_steps, length, distance)
    transform = build_transform(
        config, train, schedule.total_steps - round(distance(config.augment.off, "augment.off"))
    )

    seed_everything(config.runtime.seed)
    model = build_model(config.model, config.data, len(train.classes)).to(device)
    if config.runtime.channels_last:
        model = model.to(memory_format=torch.channels_last)
    store = CheckpointStore(run_dir, keep_last=engine.keep_last, keep=plan.keep.due)
    newest = distributed.on_main(lambda: getattr(store.newest(until=config.replay), "step", None))
    if config.init and newest is None:  # else it has done its part, and may be gone
        load_weights(model, find_weights(Path(config.init)).load()[0], head=config.init_head)
    optim = config.optim
    optimizer = create_optimizer(
        optim.name,
        model,
        lr=schedule.peak,
        weight_decay=optim.weight_decay,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        momentum=optim.momentum,
    )
    ema = AveragedWeights(model, engine.ema_decay) if engine.ema_decay else None
    state = TrainState(model, optimizer, precision, ema)
    record: dict[str, Any] = {"config": to_dict(config), "classes": train.classes, "fingerprint": train.fingerprint}
    starts = []
    if newest is not None:  # chosen by rank 0, the same everywhere
        checkpoint = store.at(newest)
        check_same_data(checkpoint.state, record)
        state.restore(checkpoint, distributed.rank)
        starts = checkpoint.state.get("origin", [])
    record["origin"] = [*starts, {**(origin or {}), "first_step": state.step, "ranks": distributed.world_size}]

    train_step = TrainStep(
        cast(nn.Module, torch.compile(model)) if config.runtime.compile else model,
        optimizer,
        transform=transform,
        clip=partial(clip_gradients, mode=optim.clip, limit=optim.clip_value),
        precision=precision,
        ema=ema,
        micro_batches=engine.batch_size // (engine.micro_batch_size or engine.batch_size) // distributed.world_size,
        batch_size=engine.batch_size,
        seed=config.runtime.seed,
        distributed=distributed,
    )
    replaying = config.replay is not None
    tracker = Tracker() if replaying else _open_tracker(config, run_dir, plan, state.step, distributed)
    if state.step == 0 and config.tracking.images and distributed.is_main:
        normalize, shown = Normalize(*statistics(config.data)), config.tracking.images
        train_step.on_inputs = lambda images: tracker.log_images(0, normalize.undo(images[:shown]))
    check = None
    if choice != "none":
        evaluation = build_evaluation(config, sources[choice], distributed, lambda: stop.requested)
        check = partial(_averaged(evaluation, distributed), state)
    trainer = Trainer(
        state=state,
        plan=plan,
        schedule=schedule,
        train_step=train_step,
        train_batches=loader.batches,
        evaluate=check,
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
    return Run(config, trainer, model, sources, "test" if "test" in sources else choice, loader)


def check_same_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check what a checkpoint recorded of its training data against what is there now.

    Raises:
        UserError: other classes, another order of them, or other images.
    """
    old, new = before["classes"], now["classes"]
    if old != new:
        first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        raise UserError(
            f"The checkpoint knows {len(old)} classes and the data has {len(new)}; the first difference is class "
            f"{first}: {old[first : first + 1]} -> {new[first : first + 1]}. Use the data set it was trained on."
        )
    if before["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"The training images are not those of the checkpoint (fingerprint {before['fingerprint']} -> "
            f"{now['fingerprint']}): images were added, removed or relabelled. Start a new run with init=."
        )


def _averaged(
    evaluation: Callable[[nn.Module], Evaluation | None], distributed: Distributed
) -> Callable[[TrainState], Evaluation | None]:
    """Evaluate the averaged weights where there are any."""

    def check(state: TrainState) -> Evaluation | None:
        distributed.broadcast_buffers(state.model)  # batch normalisation's statistics differ from rank to rank
        with state.ema.applied() if state.ema is not None else nullcontext():
            return evaluation(state.model)

    return check


def _open_tracker(config: RunConfig, run_dir: Path, plan: Plan, step: int, distributed: Distributed) -> Tracker:
    return open_tracker(
        run_dir,
        total_steps=plan.stop_step,
        steps_per_epoch=plan.steps_per_epoch,
        is_main=distributed.is_main,
        resumed_step=step,
        progress=config.tracking.progress,
        tensorboard=config.tracking.tensorboard,
        hyperparameters=to_dict(config),
        profile_steps=config.tracking.profile_steps,
    )
