"""Measure input pipelines on one core, without workers: complete pipelines of several libraries, and our stages.

A complete pipeline goes from a data set to normalized images and mixed targets on the device. All candidates read the
same few batches of images, which are in memory (files: in the page cache) after the warmup. Mode ``train`` augments the
images as configured, and ``infer`` prepares them for evaluation.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moa_train.assembly.inputs import (
    build_augment,
    build_eval_loader,
    build_eval_transform,
    build_train_loader,
    build_train_transform,
)
from moa_train.bench import input_peers
from moa_train.bench.job import Job
from moa_train.bench.peers import need
from moa_train.bench.tables import Row, Table
from moa_train.bench.timing import alternate, timed
from moa_train.data.batch import images_at_once
from moa_train.data.counter import sample_keys
from moa_train.data.dataset import open_split
from moa_train.data.file_source import FileSource
from moa_train.data.image import EncodedImage
from moa_train.data.mix import Mixer
from moa_train.data.source import Source
from moa_train.runtime.distributed import Distributed
from moa_train.schema import RunConfig, image_shape

BATCHES = 8
"""Number of different batches."""

Pipeline = Iterator[tuple[Tensor, Tensor]]


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check the peers, open the training images, and return the function that yields a table per mode and batch."""
    names = [name for name in job.against if "/" not in name]
    for name in names:
        need(name)
    source = open_split(job.config.data, "train")
    batches = job.batches or [job.config.engine.micro_batch_size or job.config.engine.batch_size]

    def measure() -> Iterator[Table]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for mode in job.modes:
                for batch in batches:
                    yield _compare(job, source, names, mode, batch)
        finally:
            torch.set_num_threads(threads)

    return measure


def _compare(job: Job, source: Source, names: list[str], mode: str, batch: int) -> Table:
    rows = np.linspace(0, len(source) - 1, BATCHES * batch).astype(np.int64)
    source, config = source.subset(rows, source.title), copy.deepcopy(job.config)
    config.engine.batch_size = config.engine.micro_batch_size = config.engine.eval_batch_size = batch
    config.data.workers, config.data.unreadable = 0, "fail"

    complete = {"moa-train": _ours(job, config, source, mode)}
    arguments = (config, source, mode, batch, job.device)
    if "timm" in names:
        complete["timm"] = input_peers.timm(*arguments)
        complete["timm prefetcher"] = input_peers.timm(*arguments, prefetcher=True)
    if "torchvision" in names:
        complete["torchvision"] = input_peers.torchvision(*arguments)
    candidates: dict[str, tuple[Callable[[], object], int]] = {
        name: (partial(next, pipeline), batch) for name, pipeline in complete.items()
    }
    candidates |= {f"  {name}": stage for name, stage in _stages(job, config, source, mode, batch).items()}

    measures = {name: timed(call, job.device, least_seconds=job.seconds) for name, (call, _) in candidates.items()}
    seconds = alternate(measures, job.rounds)
    table = [
        Row.rate(name, seconds[name], images, us=1e6 * median(seconds[name]) / images)
        for name, (_, images) in candidates.items()
    ]
    ratios = [table[0].over(row) for row in table[1 : len(complete)]]
    height, width = image_shape(config.data.image_size)
    title = f"{mode}, batch {batch}, {height} x {width}, {config.data.name}, one core; us: microseconds per image"
    return Table("input", title, [*table, *ratios])


def _ours(job: Job, config: RunConfig, source: Source, mode: str) -> Pipeline:
    if mode == "infer":
        evaluation, prepare = build_eval_loader(config, source, Distributed(job.device)), build_eval_transform(config)
        for batch in chain.from_iterable(repeat(evaluation)):
            there = batch.to(job.device, non_blocking=True)
            yield prepare(there), there.labels
    augment = build_train_transform(config, source, weak_from=sys.maxsize)
    for batch in build_train_loader(config, source, Distributed(job.device)).batches():
        yield augment(batch.to(job.device, non_blocking=True), batch.step)


def _stages(
    job: Job, config: RunConfig, source: Source, mode: str, size: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """Return the stages of our pipeline by name, each with the number of images that it processes at a time."""
    alone = Distributed(job.device)
    loader, evaluation = build_train_loader(config, source, alone), build_eval_loader(config, source, alone)
    view = loader.view if mode == "train" else evaluation.view
    draw = loader.order.step(0)
    keys = sample_keys(config.runtime.seed, draw.epoch, draw.index, draw.repeat)
    batch = next(loader.batches()) if mode == "train" else next(iter(evaluation))

    stages: dict[str, tuple[Callable[[], object], int]] = {}
    if isinstance(source, FileSource):
        paths = [Path(source.name(index)) for index in draw.index]
        files, numbers = [path.read_bytes() for path in paths], view.numbers(keys)
        stages["read"] = (partial(_each, Path.read_bytes, paths), size)
        stages["decode"] = (partial(_each, lambda data: EncodedImage(data, source.decoding).decode(), files), size)
        stages["decode, crop, resize"] = (
            partial(
                _each, lambda place: view(EncodedImage(files[place], source.decoding), numbers[place]), range(size)
            ),
            size,
        )
    else:
        stages["gather"] = (partial(source.gather, draw.index), size)
    if job.device.type != "cpu":
        stages["transfer"] = (partial(batch.to, job.device), size)
    augment, images = build_augment(config, source), batch.to(job.device).images
    some = images_at_once(images)
    pixels = images[:some]
    if mode == "train":
        for name, op in augment.ops.items():
            stages[name] = (partial(op, pixels, keys[:some]), len(pixels))
    stages["normalize"] = (partial(augment.normalize, pixels), len(pixels))
    if mode == "train":
        normal, labels = augment.normalize(images), batch.labels.to(job.device)
        if config.augment.erasing:
            stages["erase"] = (partial(augment.erase, normal[:some], keys[:some]), len(pixels))
        for name in ("mixup", "cutmix"):
            if alpha := getattr(config.augment, name):
                only = replace(config.augment, **{"mixup": 0.0, "cutmix": 0.0, "mix_prob": 1.0, name: alpha})
                mixer = Mixer(only, len(source.classes))
                stages[name] = (partial(mixer, normal, mixer.smooth(labels), (config.runtime.seed, 0, 0)), size)
    return stages


def _each(function: Callable[..., object], arguments: Iterable[Any]) -> None:
    for argument in arguments:
        function(argument)
