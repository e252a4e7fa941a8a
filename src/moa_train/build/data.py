"""Data: splits, loaders, and what a batch goes through on the device."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

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
from moa_train.data.image import Decoding
from moa_train.runtime.device import available_cores
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig, RunConfig, image_shape


def build_source(config: DataConfig, split: str) -> Source:
    """Open one split of the data set."""
    source = open_source(
        config.name,
        split=split,
        image_size=image_shape(config.image_size),
        root=config.root,
        val_fraction=config.val_fraction,
        download=config.download,
        rule=config.hold_out,
        decoding=Decoding(config.max_pixels, (config.range[0], config.range[1]) if config.range else None),
    )
    if split == "train" and config.limit and config.limit < len(source):
        # Evenly spaced: the samples of a folder come class by class.
        return source.subset(np.linspace(0, len(source) - 1, config.limit).astype(np.int64), f"{config.name}/part")
    return source


def open_splits(config: RunConfig, distributed: Distributed) -> tuple[dict[str, Source], str]:
    """Open the splits that there are, and name the one that chooses the best checkpoint (or "none")."""
    data, choice = config.data, config.engine.eval_split
    if data.download:  # once, not by all ranks at the same time
        distributed.on_main(lambda: len(build_source(data, "train")))
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


def build_train_loader(config: RunConfig, source: Source, distributed: Distributed) -> TrainLoader:
    """Return this rank's micro-batches of every step."""
    engine, augment = config.engine, config.augment
    return TrainLoader(
        source,
        order=Order(len(source), engine.batch_size, config.runtime.seed, repeats=augment.repeats),
        micro_batch_size=engine.micro_batch_size or engine.batch_size,
        rank=distributed.rank,
        world_size=distributed.world_size,
        workers=workers(config.data, distributed),
        crop=augment.crop,
        scale=(augment.scale[0], augment.scale[1]),
        ratio=(augment.ratio[0], augment.ratio[1]),
        interpolation=augment.interpolation,
        unreadable=config.data.unreadable,
        quarantine_budget=config.data.unreadable_budget,
        pin_memory=distributed.device.type == "cuda",
    )


def build_eval_loader(config: RunConfig, source: Source, distributed: Distributed) -> EvalLoader:
    """Return this rank's batches of an evaluation."""
    return EvalLoader(
        source,
        batch_size=config.engine.eval_batch_size or (64 if distributed.device.type == "cpu" else 256),
        rank=distributed.rank,
        world_size=distributed.world_size,
        workers=workers(config.data, distributed),
        crop_ratio=config.data.eval_crop,
        pin_memory=distributed.device.type == "cuda",
    )


def workers(config: DataConfig, distributed: Distributed) -> int:
    """Return how many processes a rank decodes files with."""
    if config.workers is not None:
        return config.workers
    return min(8, max(1, available_cores() // distributed.local_world_size))


def build_train_transform(
    config: RunConfig, source: Source, off_step: int
) -> Callable[[Batch, int], tuple[Tensor, Tensor]]:
    """Return the function from a batch on the device to images and target distributions.

    From step ``off_step`` on, strong augmentation and mixing are off.
    """
    seed = config.runtime.seed
    augment, mixer = build_augment(config, source), build_mixer(config, len(source.classes))

    def transform(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        strong = step < off_step
        images, targets = mixer(augment(batch, strong), batch.labels, (seed, step, batch.micro), strong)
        return _layout(images, config.runtime.channels_last), targets

    return transform


def build_augment(config: RunConfig, source: Source) -> BatchAugment:
    """Return the augmentation of batches of training images."""
    settings = config.augment
    mean, std = statistics(config.data)
    return BatchAugment(
        seed=config.runtime.seed,
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


def build_mixer(config: RunConfig, num_classes: int) -> Mixer:
    """Return mixup, cutmix and smoothing of the targets."""
    settings = config.augment
    return Mixer(
        num_classes=num_classes,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        prob=settings.mix_prob,
        switch_prob=settings.mix_switch_prob,
        smoothing=settings.label_smoothing,
    )


def build_eval_transform(config: RunConfig) -> Callable[[Batch], Tensor]:
    """Return the function from a batch on the device to normalised images."""
    normalize = build_normalize(config.data)
    return lambda batch: _layout(normalize(batch.images), config.runtime.channels_last)


def build_normalize(config: DataConfig) -> Normalize:
    """Return the normalisation of images, which can be undone."""
    return Normalize(*statistics(config))


def statistics(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the channel means and deviations that images are normalised with."""
    known = STATISTICS[config.name]
    return tuple(config.mean or known.mean), tuple(config.std or known.std)


def _layout(images: Tensor, channels_last: bool) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images
