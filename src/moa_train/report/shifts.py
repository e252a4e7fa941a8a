"""Published test sets with shifted images, from folders and files as they are distributed."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from moa_train.data.array_source import ArraySource
from moa_train.data.file_source import FileSource
from moa_train.data.image import Decoding
from moa_train.data.source import Source
from moa_train.data.tree import ClassTree, class_folders, scan
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig, image_shape

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Mean error of AlexNet over the five severities of each corruption of ImageNet-C (arXiv 1903.12261)."""

EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
"""Corruptions that are published too, but are not part of the mean corruption error."""


class SkipError(Exception):
    """Report why a test set is skipped."""


@dataclass(frozen=True)
class Shift:
    """One set of shifted images.

    Attributes:
        benchmark: name of the test set, as in the setting ``robustness``.
        variant: name of the part, for example of the corruption; may be empty.
        severity: 1 to 5; 0 if there are no severities.
        source: the images, with the labels of the model.
        cropped: whether the images are cropped already, so that they are evaluated as they are.
    """

    benchmark: str
    variant: str
    severity: int
    source: Source
    cropped: bool = False


@dataclass(frozen=True)
class Model:
    """What a test set needs to know of a model: its classes in the order of the logits, and its data settings."""

    classes: Sequence[str]
    data: DataConfig

    @property
    def is_imagenet(self) -> bool:
        """Whether the classes are WordNet identifiers, such as n01440764."""
        return all(re.fullmatch(r"n\d{8}", name) for name in self.classes)

    def is_cifar(self, count: int) -> bool:
        """Return whether the classes are those of CIFAR-10 or CIFAR-100, in the official order."""
        ends = {10: ("airplane", "truck"), 100: ("apple", "worm")}[count]
        names = list(self.classes)
        return len(names) == count and names == sorted(names) and (names[0], names[-1]) == ends

    def files(self, title: str, tree: ClassTree, classes: Sequence[str]) -> FileSource:
        """Return the images of the classes that the model knows.

        Args:
            title: for messages.
            tree: the images.
            classes: the model's name of each class of the tree.
        """
        places = {name: place for place, name in enumerate(self.classes)}
        table = np.array([places.get(name, -1) for name in classes])
        rows = np.flatnonzero(table[tree.labels] >= 0)
        if not len(rows):
            raise SkipError(f"{tree.root} has no class of the model")
        labels = np.maximum(table, 0)[tree.labels]
        tree = replace(tree, classes=list(self.classes), labels=labels)
        return FileSource(title, tree, image_shape(self.data.image_size), rows, Decoding.of(self.data))


def locate(root: Path, *names: str) -> Path | None:
    """Return the file or folder with one of these names, ignoring case: ``root`` itself, or up to three levels below.

    Folders of classes and severities are not searched.
    """
    wanted, level = {name.lower() for name in names}, [root]
    for _ in range(4):
        for path in level:
            if path.name.lower() in wanted:
                return path
        folders = (path for path in level if not _INNER.fullmatch(path.name) and path.is_dir())
        level = [child for path in folders for child in sorted(path.iterdir())]
    return None


_INNER = re.compile(r"n\d{8}|\d+")


def _found(root: Path, *names: str) -> Path:
    if (path := locate(root, *names)) is None:
        raise SkipError(f"there is no {' or '.join(names)} in {root}")
    return path


def _needs_imagenet(model: Model) -> None:
    if not model.is_imagenet:
        raise SkipError("the classes of the model are not those of ImageNet, named n01440764 and so on")


def class_subset(benchmark: str, *names: str) -> Callable[[Path, Model], Iterator[Shift]]:
    """Return the reader of images in folders that are named like classes of ImageNet."""

    def read(root: Path, model: Model) -> Iterator[Shift]:
        _needs_imagenet(model)
        tree = scan(_found(root, *names))
        yield Shift(benchmark, "", 0, model.files(benchmark, tree, tree.classes))

    return read


def imagenet_v2(root: Path, model: Model) -> Iterator[Shift]:
    """Yield the variants of ImageNet-V2. Folder k holds the images of class k, in the order of the sorted classes."""
    _needs_imagenet(model)
    variants = {
        name: path
        for name in ("matched-frequency", "threshold0.7", "top-images")
        if (path := locate(root, f"imagenetv2-{name}-format-val", f"imagenetv2-{name}"))
    }
    if not variants:
        raise SkipError(f"there is no imagenetv2-matched-frequency-format-val in {root}")
    for name, path in variants.items():
        folders = class_folders(path)
        if sorted(folders, key=lambda name: (len(name), name)) != [str(k) for k in range(len(model.classes))]:
            raise SkipError(
                f"{path} must hold the folders 0 to {len(model.classes) - 1}, one for each class of the model"
            )
        classes = sorted(model.classes)
        tree = scan(path)
        yield Shift("imagenet-v2", name, 0, model.files("imagenet-v2", tree, [classes[int(k)] for k in tree.classes]))


def imagenet_c(root: Path, model: Model) -> Iterator[Shift]:
    """Yield the corruptions of ImageNet-C: CORRUPTION/SEVERITY/CLASS/NAME.JPEG, possibly below noise/, blur/ etc."""
    _needs_imagenet(model)
    place = locate(root, "imagenet-c") or root
    found = [(name, path) for name in (*ALEXNET, *EXTRA) if (path := locate(place, name)) and path.is_dir()]
    if not found:
        raise SkipError(f"there is no gaussian_noise/1 or other corruption in {place}")
    for name, path in found:
        for severity in range(1, 6):
            if (path / str(severity)).is_dir():
                tree = scan(path / str(severity))
                source = model.files(f"imagenet-c/{name}/{severity}", tree, tree.classes)
                yield Shift("imagenet-c", name, severity, source, cropped=True)


def cifar_c(count: int) -> Callable[[Path, Model], Iterator[Shift]]:
    """Return the reader of CIFAR-10-C or CIFAR-100-C: CORRUPTION.npy with five severities in a row, and labels.npy."""
    benchmark = f"cifar-{count}-c"

    def read(root: Path, model: Model) -> Iterator[Shift]:
        _needs_cifar(model, count)
        place = _found(root, benchmark)
        labels = _load(place / "labels.npy")
        for name in (*ALEXNET, *EXTRA):
            if (path := place / f"{name}.npy").is_file():
                images = _load(path)
                if len(images) != len(labels) or len(images) % 5:
                    raise UserError(f"{path} holds {len(images)} images, but labels.npy has {len(labels)} labels.")
                part = len(images) // 5
                for severity in range(1, 6):
                    rows = np.arange((severity - 1) * part, severity * part)
                    source = _arrays(f"{benchmark}/{name}/{severity}", images, labels, model, rows)
                    yield Shift(benchmark, name, severity, source)

    return read


def cifar_10_1(root: Path, model: Model) -> Iterator[Shift]:
    """Yield the versions of CIFAR-10.1."""
    _needs_cifar(model, 10)
    found = {version: locate(root, f"cifar10.1_{version}_data.npy") for version in ("v6", "v4")}
    if not any(found.values()):
        raise SkipError(f"there is no cifar10.1_v6_data.npy in {root}")
    for version, path in found.items():
        if path is not None:
            labels = _load(path.with_name(f"cifar10.1_{version}_labels.npy"))
            yield Shift("cifar-10.1", version, 0, _arrays(f"cifar-10.1/{version}", _load(path), labels, model))


def _needs_cifar(model: Model, count: int) -> None:
    if not model.is_cifar(count):
        raise SkipError(f"the classes of the model are not those of CIFAR-{count} in their official order")


def _load(path: Path) -> NDArray[np.integer]:
    try:
        array: NDArray[np.integer] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}). Download it again, or remove its folder.") from error
    return array


def _arrays(
    title: str,
    images_NHWC: NDArray[np.integer],
    labels: NDArray[np.integer],
    model: Model,
    rows: NDArray[np.int64] | None = None,
) -> ArraySource:
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
        raise UserError(f"{title}: expected uint8 images of shape (N, 32, 32, 3), not {images_NHWC.shape}.")
    if len(labels) != len(images_NHWC) or not 0 <= labels.min() <= labels.max() < len(model.classes):
        raise UserError(f"{title}: the labels do not match {len(images_NHWC)} images of {len(model.classes)} classes.")
    images = cast(NDArray[np.uint8], images_NHWC).transpose(0, 3, 1, 2)
    numbers = np.asarray(labels, np.int64)
    return ArraySource(title, images, numbers, model.classes, image_shape(model.data.image_size), rows)


READERS: dict[str, Callable[[Path, Model], Iterator[Shift]]] = {
    "imagenet-v2": imagenet_v2,
    "imagenet-a": class_subset("imagenet-a", "imagenet-a"),
    "imagenet-r": class_subset("imagenet-r", "imagenet-r"),
    "imagenet-sketch": class_subset("imagenet-sketch", "sketch", "imagenet-sketch"),
    "imagenet-c": imagenet_c,
    "cifar-10.1": cifar_10_1,
    "cifar-10-c": cifar_c(10),
    "cifar-100-c": cifar_c(100),
}


def real_labels(root: Path, files: NDArray[np.bytes_] | None, model: Model) -> list[list[int]]:
    """Return the ReaL labels (arXiv 2006.07159) of the images of ImageNet's validation set: zero or more for each.

    ``real.json`` lists the labels of the images in the order of their numbers, ILSVRC2012_val_00000001 first.
    """
    _needs_imagenet(model)
    path = _found(root, "real.json")
    if len(model.classes) != 1000:
        raise SkipError("the labels are those of all 1,000 classes, but the model has another number of classes")
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Download it again, or remove it.") from error
    numbers = [re.search(rb"ILSVRC2012_val_(\d{8})", name) for name in ([] if files is None else files.tolist())]
    if not numbers or not all(numbers):
        raise SkipError("the images are not named ILSVRC2012_val_00000001.JPEG and so on")
    order = np.argsort(np.array(model.classes), kind="stable")
    try:
        labels = [[int(order[label]) for label in entries[int(number[1]) - 1]] for number in numbers if number]
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold a list of labels for each of the images ({error}).") from error
    if not any(labels):
        raise SkipError("none of the images has a ReaL label")
    return labels
