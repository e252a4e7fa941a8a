"""Input pipelines of other libraries that produce the same batches by applying their transforms to Pillow images.

The peers run in this process, without workers. Like our pipeline, they produce normalized float32 images on the device,
and targets mixed by the same rules.
"""

import math
import random
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moa_train.data.array_source import ArraySource
from moa_train.data.image import open_image
from moa_train.data.source import Source
from moa_train.plugins import DATASETS
from moa_train.schema import DataConfig, RunConfig, image_shape

Batches = Iterator[tuple[Tensor, Tensor]]

PASSES = 100
"""Number of passes over the images that count as one epoch, because prefetching pauses at the end of an epoch."""


class PillowImages(Dataset):
    """The images of a source as Pillow images, as in torchvision's data sets.

    Args:
        source: arrays, which are kept in memory as (H, W, C), or files, which are opened on access.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.labels = source, source.labels.tolist()
        self.transform: Callable[[Image.Image], Any] = lambda image: image
        self.target_transform = None
        if isinstance(source, ArraySource):
            pixels_NHWC = source.gather(np.arange(len(source))).permute(0, 2, 3, 1)
            self.pixels = np.ascontiguousarray(pixels_NHWC.numpy())

    def __len__(self) -> int:
        return PASSES * len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index %= len(self.source)
        return self.transform(self.open(index)), self.labels[index]

    def open(self, index: int) -> Image.Image:
        """Return an image without its transform."""
        if self.source.in_memory:
            return Image.fromarray(self.pixels[index])
        with Path(self.source.name(index)).open("rb") as file:
            return open_image(file).convert("RGB")


def statistics(config: DataConfig) -> tuple[list[float], list[float]]:
    """Return the channel means and standard deviations for normalization."""
    known = DATASETS.load(config.name)
    return list(config.mean or known.mean), list(config.std or known.std)


def timm(
    config: RunConfig, source: Source, mode: str, batch: int, device: torch.device, prefetcher: bool = False
) -> Batches:
    """Yield the batches of timm's ``create_loader``, which timm's train.py uses with ``prefetcher`` by default.

    The prefetcher normalizes and erases complete batches. As in timm, RandAugment replaces color jitter.
    """
    from timm.data import Mixup, create_loader
    from timm.data.auto_augment import RandAugment
    from torchvision import transforms

    augment, size = config.augment, image_shape(config.data.image_size)
    mean, std = statistics(config.data)
    random.seed(config.runtime.seed)
    dataset: Any = PillowImages(source)
    common: dict[str, Any] = {"input_size": (3, *size), "batch_size": batch, "mean": mean, "std": std}
    common |= {"num_workers": 0, "persistent_workers": False, "device": device, "use_prefetcher": prefetcher}
    if mode == "infer":
        ratio = 1.0 if source.in_memory else config.data.eval_crop
        return _endless(create_loader(dataset, crop_pct=ratio, interpolation="bicubic", **common), device)
    recipe = f"rand-m{augment.randaugment_magnitude:g}-n{augment.randaugment_ops}-mstd{augment.randaugment_std}-inc1"
    common |= {"is_training": True, "scale": augment.scale, "ratio": augment.ratio, "hflip": augment.flip}
    common |= {"interpolation": augment.interpolation, "color_jitter": None}
    common |= {"auto_augment": recipe if augment.randaugment_ops else None}
    loader = create_loader(dataset, re_prob=augment.erasing, re_mode="pixel", **common)
    steps = dataset.transform.transforms
    if augment.crop != "resized":  # like the scripts of Swin and DeiT for small images
        pad = [transforms.RandomCrop(size, augment.padding)] if augment.crop == "pad" else []
        steps[:1] = [*_resize(source, size), *pad]
    for step in steps:
        for operation in step.ops if isinstance(step, RandAugment) else ():
            if operation.name == "PosterizeIncreasing":  # timm may ask for 0 bits, which Pillow 13 rejects
                operation.aug_fn = _at_least_one_bit(operation.aug_fn)
    batches = _endless(loader, device)
    if not (augment.mixup or augment.cutmix):
        return batches
    mix = Mixup(
        augment.mixup,
        augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=len(source.classes),
    )
    return (mix(images, labels) for images, labels in batches)


def torchvision(config: RunConfig, source: Source, mode: str, batch: int, device: torch.device) -> Batches:
    """Yield the batches of ``transforms.v2`` and a DataLoader. Its RandAugment has a constant strength."""
    from torchvision.transforms import v2

    augment, size = config.augment, image_shape(config.data.image_size)
    dataset = PillowImages(source)
    last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics(config.data))]
    if mode == "infer":
        ratio = 1.0 if source.in_memory else config.data.eval_crop
        shorter = math.floor(min(size) / ratio)
        first = [v2.Resize(shorter, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
        dataset.transform = v2.Compose([*first, *last])
        return _endless(DataLoader(dataset, batch), device)
    crops: dict[str, list[Any]] = {
        "resized": [v2.RandomResizedCrop(size, augment.scale, augment.ratio, v2.InterpolationMode.BICUBIC)],
        "pad": [*_resize(source, size), v2.RandomCrop(size, augment.padding)],
        "none": _resize(source, size),
    }
    strength = round(augment.randaugment_magnitude)
    dataset.transform = v2.Compose(
        [
            *crops[augment.crop],
            v2.RandomHorizontalFlip(augment.flip),
            v2.RandAugment(augment.randaugment_ops, strength, 11, v2.InterpolationMode.BILINEAR),
            *last,
            v2.RandomErasing(augment.erasing, value="random"),
        ]
    )
    classes = len(source.classes)
    mixes: list[Any] = [v2.MixUp(alpha=augment.mixup, num_classes=classes)] if augment.mixup else []
    mixes += [v2.CutMix(alpha=augment.cutmix, num_classes=classes)] if augment.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes else lambda *batch: batch
    return (mix(*pair) for pair in _endless(DataLoader(dataset, batch, shuffle=True, drop_last=True), device))


def _endless(loader: Any, device: torch.device) -> Batches:
    for images, labels in chain.from_iterable(repeat(loader)):
        yield images.to(device), labels.to(device)


def _resize(source: Source, size: tuple[int, int]) -> list[Any]:
    """Return the transforms that bring an uncropped image to ``size``; images in memory already have it."""
    from torchvision import transforms

    resize = transforms.Resize(min(size), transforms.InterpolationMode.BICUBIC)
    return [] if source.in_memory else [resize, transforms.CenterCrop(size)]


def _at_least_one_bit(posterize: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    return lambda image, bits, **settings: posterize(image, max(1, bits), **settings)
