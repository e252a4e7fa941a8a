"""Build the data pipeline: splits, loaders, and the transforms of batches on the device."""

from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor

from moa_train.data.augment import BatchAugment, Normalize, plan_crop
from moa_train.data.dataset import available_splits, open_split
from moa_train.data.loader import EvalLoader, TrainLoader
from moa_train.data.mix import Mixer
from moa_train.data.order import Order
from moa_train.data.source import Source
from moa_train.data.tree import compare_classes
from moa_train.engine.distillation import Teachers
from moa_train.interfaces import Batch
from moa_train.plugins import DATASETS
from moa_train.runtime.device import available_cores
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig, EngineConfig, RunConfig


def open_splits(config: RunConfig, distributed: Distributed) -> tuple[dict[str, Source], str]:
    """Open all splits of the data set, and return them with the split that selects the best checkpoint (or "none")."""
    data = config.data
    downloads = getattr(DATASETS.load(data.name), "may_download", None)
    if downloads is not None and downloads(data):  # one rank downloads the data before the others open it
        distributed.on_main(lambda: len(open_split(data, "train")))
    sources = {split: open_split(data, split) for split in available_splits(data)}
    if "val" in sources and not len(sources["val"]):  # the classes are too small for this fraction
        del sources["val"]
    for source in sources.values():
        compare_classes(sources["train"].place, sources["train"].classes, source.place, source.classes)
    choice = validation_split(config, sources)
    if choice not in (*sources, "none"):
        raise UserError(
            f"engine.eval_split={choice}, but {data.name} has only {', '.join(sources)}. Hold out "
            f"{'more' if data.val_fraction else 'some'} training images for validation (data.val_fraction=0.1; it is "
            f"{data.val_fraction}), or choose another split; engine.eval_split=test is the published protocol."
        )
    return sources, choice


def check_same_images(sources: Mapping[str, Source], distributed: Distributed) -> None:
    """Check that all ranks read the same images: otherwise, their order and the numbers of batches would differ.

    Raises:
        UserError: they differ; every rank raises it, and the message says how many images each rank has.
    """
    found = {split: {"images": len(source), "fingerprint": source.fingerprint} for split, source in sources.items()}
    distributed.check_same(
        "their images",
        found,
        "Every machine needs the same data: the same class folders and file names. Compare the copies, or use storage "
        "that all machines share.",
    )


def open_teachers(config: RunConfig, train: Source, distributed: Distributed) -> Teachers | None:
    """Return the teachers of a distillation, after checking that all ranks read the same predictions, or None."""
    distill = config.distill
    if not distill.teachers:
        return None
    teachers = Teachers.open(distill.teachers, distill.weight, train.classes, train.fingerprint)
    distributed.check_same(
        "the predictions of distill.teachers",
        teachers.fingerprint,
        "Every machine needs the same copies of the teachers' runs.",
    )
    return teachers


def validation_split(config: RunConfig, splits: Container[str]) -> str:
    """Return the split that selects the best checkpoint, or "none"."""
    choice = config.engine.eval_split
    return ("val" if "val" in splits else "none") if choice == "auto" else choice


def build_train_loader(
    config: RunConfig, source: Source, distributed: Distributed, stop: Callable[[], bool] = lambda: False
) -> TrainLoader:
    """Return the loader of this rank's micro-batches."""
    engine = config.engine
    return TrainLoader(
        source,
        config.data,
        order=Order(len(source), engine.batch_size, config.runtime.seed, repeats=config.augment.repeats),
        view=plan_crop(config.augment, source)[0],
        micro_batch_size=engine.micro_batch_size or engine.batch_size,
        rank=distributed.rank,
        world_size=distributed.world_size,
        workers=workers(config.data, distributed.local_world_size),
        pin_memory=distributed.device.type == "cuda",
        timeout=config.runtime.timeout,
        stop=stop,
    )


def build_eval_loader(
    config: RunConfig, source: Source, distributed: Distributed, stop: Callable[[], bool] = lambda: False
) -> EvalLoader:
    """Return the loader of this rank's evaluation batches."""
    return EvalLoader(
        source,
        batch_size=eval_batch_size(config.engine, distributed.device),
        rank=distributed.rank,
        world_size=distributed.world_size,
        workers=workers(config.data, distributed.local_world_size),
        crop_ratio=config.data.eval_crop,
        pin_memory=distributed.device.type == "cuda",
        timeout=config.runtime.timeout,
        stop=stop,
    )


def eval_batch_size(config: EngineConfig, device: torch.device) -> int:
    """Return the number of images per forward pass in evaluation."""
    return config.eval_batch_size or (64 if device.type == "cpu" else 256)


def workers(config: DataConfig, local_world_size: int = 1) -> int:
    """Return the number of processes per rank that decode files."""
    if config.workers is not None:
        return config.workers
    return min(8, max(1, available_cores() // local_world_size))


def build_train_transform(
    config: RunConfig, source: Source, weak_from: int, teachers: Teachers | None = None
) -> Callable[[Batch, int], tuple[Tensor, Tensor]]:
    """Return the function that converts a batch on the device to images and target distributions.

    From step ``weak_from`` on, it applies neither strong augmentation nor mixing.
    """
    seed = config.runtime.seed
    augment, mixer = build_augment(config, source), Mixer(config.augment, len(source.classes))

    def transform(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        strong = step < weak_from
        targets = mixer.smooth(batch.labels)
        if teachers is not None:
            targets = teachers(targets, batch.index)
        images, targets = mixer(augment(batch, strong), targets, (seed, step, batch.micro), strong)
        return _layout(images, config.runtime.channels_last), targets

    return transform


def build_augment(config: RunConfig, source: Source) -> BatchAugment:
    """Return the augmentation of batches of training images."""
    crop = plan_crop(config.augment, source)[1]
    return BatchAugment(config.augment, crop=crop, seed=config.runtime.seed, normalize=Normalize.of(config.data))


def build_eval_transform(config: RunConfig) -> Callable[[Batch], Tensor]:
    """Return the function that converts a batch on the device to normalized images."""
    normalize = normalization(config)
    return lambda batch: normalize(batch.images)


def normalization(config: RunConfig) -> Callable[[Tensor], Tensor]:
    """Return the function from uint8 images (B, 3, H, W) to the images that the model receives in evaluation."""
    normalize = Normalize.of(config.data)
    return lambda images: _layout(normalize(images), config.runtime.channels_last)


def _layout(images: Tensor, channels_last: bool) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images
