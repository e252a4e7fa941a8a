"""Check a data set before a long run for unreadable images, duplicates, and images in both training and test."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from moa_train.data.array_source import ArraySource
from moa_train.data.image import Decoding, EncodedImage, reading
from moa_train.data.pack import check_classes, check_origin, is_packed, read_pack, verify_pack
from moa_train.data.tree import ClassTree, check_plausible, check_split_names, is_broken_link, scan, scan_split
from moa_train.data.watch import map_files
from moa_train.runtime.errors import UserError
from moa_train.schema import SPLITS

MIN_CONTRAST = 16
"""Images whose lowest and highest values (0 to 255) differ by less than this are reported."""


@dataclass
class Report:
    """The findings of a check. Images are equal if their decoded pixels are.

    Attributes:
        images: number of images in each split.
        ignored: number of files in each split that are not images.
        broken: broken links, and links to a folder that contains them.
        unreadable: a message for each image that cannot be decoded.
        duplicates: groups of equal images of one split.
        leaks: groups of equal images of different splits.
        conflicts: groups from ``duplicates`` and ``leaks`` whose images have different classes.
        flat: images with hardly any contrast, for example because 12-bit values are stored as 16-bit values.
        stale: images whose pixels in the pack differ from those in the file.
    """

    images: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    leaks: list[list[str]] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)
    flat: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Return whether there are no findings."""
        return not (self.broken or self.unreadable or self.duplicates or self.leaks or self.flat or self.stale)


@dataclass(frozen=True)
class _Item:
    split: str
    label: str
    name: str


@dataclass(frozen=True)
class _Pixels:
    """A hash of an image's pixels, and the difference between its highest and lowest value."""

    digest: bytes
    contrast: int

    @classmethod
    def of(cls, image: np.ndarray) -> "_Pixels":
        digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(image).data)
        return cls(digest.digest(), int(image.max()) - int(image.min()))


def check(
    root: Path,
    workers: int = 0,
    progress: Callable[[int], None] = lambda images: None,
    decoding: Decoding | None = None,
) -> Report:
    """Decode and compare every image below ``root``.

    Args:
        root: folder with class-folder trees or packs of splits, or one class-folder tree.
        workers: number of processes that decode, at least one.
        progress: called with the number of images checked so far.
        decoding: limits and value range, as in training.

    Raises:
        UserError: ``root`` holds no data set or something that does not look like one, a class folder is empty, the
            splits have different classes, or a pack is damaged or was created from different files.
    """
    check_split_names(root)
    splits = [split for split in SPLITS if is_packed(root, split) or (root / split).is_dir()]
    report, equal, done = Report(), defaultdict[bytes, list[_Item]](list), 0
    for split in splits or [""]:
        report.images[split or root.name] = 0
        for item, pixels in _split(root, split, workers, report, decoding):
            if isinstance(pixels, _Pixels):
                equal[pixels.digest].append(item)
                report.flat += [item.name] if pixels.contrast < MIN_CONTRAST else []
            elif is_broken_link(item.name):
                report.broken.append(item.name)
            else:
                report.unreadable.append(pixels)
            report.images[split or root.name] += 1
            done += 1
            progress(done)
    for group in equal.values():
        if len(group) > 1:
            names = [item.name for item in group]
            (report.leaks if len({item.split for item in group}) > 1 else report.duplicates).append(names)
            if len({item.label for item in group}) > 1:
                report.conflicts.append(names)
    return report


def _split(
    root: Path, split: str, workers: int, report: Report, decoding: Decoding | None
) -> Iterator[tuple[_Item, _Pixels | str]]:
    """Yield the images of a split; if both its pack and its files exist, compare them."""
    pack, tree = None, None
    if split and is_packed(root, split):
        verify_pack(root, split)
        pack = read_pack(root, split, f"{root.name}/{split}", (1, 1))
        check_classes(root, split, pack.classes)
    if not split:
        check_plausible(root, split)
        tree = scan(root)
    elif (root / split).is_dir():
        tree = scan_split(root, split)
        if pack is not None:
            check_origin(root, split, tree)
        check_classes(root, split, tree.classes)
    if tree is None:
        assert pack is not None
        yield from _of_pack(pack, split)
        return
    report.ignored[split or root.name] = tree.ignored
    report.broken += tree.broken
    packed = _of_pack(pack, split) if pack is not None else None
    for item, pixels in _of_tree(tree, split, workers, decoding):
        if packed is not None and next(packed)[1] != pixels and isinstance(pixels, _Pixels):
            report.stale.append(item.name)
        yield item, pixels


def _of_pack(pack: ArraySource, split: str) -> Iterator[tuple[_Item, _Pixels]]:
    for row, image in enumerate(pack.images):
        yield _Item(split, pack.classes[pack.labels[row]], pack.name(row)), _Pixels.of(image)


def _of_tree(
    tree: ClassTree, split: str, workers: int, decoding: Decoding | None
) -> Iterator[tuple[_Item, _Pixels | str]]:
    items = (_Item(split, tree.classes[label], str(tree.path(row))) for row, label in enumerate(tree.labels))
    paths = (os.fspath(tree.path(row)) for row in range(len(tree.files)))
    pixels_of = partial(_pixels_of_file, decoding)
    max_seconds = (decoding or Decoding()).max_seconds
    yield from zip(items, map_files(pixels_of, paths, workers, max_seconds), strict=True)


def _pixels_of_file(decoding: Decoding | None, path: str) -> _Pixels | str:
    """Return the pixels of a file, or the reason why it cannot be decoded."""
    try:
        with reading(Path(path)):
            return _Pixels.of(EncodedImage.of(Path(path), decoding).decode().numpy())
    except UserError as error:
        return str(error)
