"""Scan a data set before a long run: unreadable images, duplicates, images shared by training and test."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np

from moa_train.data.datasets import SPLITS
from moa_train.data.image import Decoding, EncodedImage, reading
from moa_train.data.pack import is_packed, read_pack, verify_pack
from moa_train.data.tree import same_classes, scan
from moa_train.runtime.errors import UserError


@dataclass
class Report:
    """What a scan found. Images are equal if their decoded pixels are.

    Attributes:
        images: number of images in each split.
        ignored: files that are no images, in each split.
        unreadable: a message for each image that cannot be decoded.
        duplicates: groups of equal images of one split.
        leaks: groups of equal images of different splits.
        conflicts: those of the groups above whose images have different classes.
    """

    images: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    leaks: list[list[str]] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Say whether nothing was found."""
        return not (self.unreadable or self.duplicates or self.leaks)


@dataclass(frozen=True)
class _Item:
    split: str
    label: str
    name: str


def check(
    root: Path,
    workers: int = 0,
    progress: Callable[[int], None] = lambda images: None,
    decoding: Decoding | None = None,
) -> Report:
    """Decode and compare every image below ``root``.

    Args:
        root: folder with class-folder trees or packs of splits, or one class-folder tree.
        workers: processes that decode; 0 decodes here.
        progress: called with the number of images done.
        decoding: limits and value range, as in training.

    Raises:
        UserError: there is no data set, a class folder is empty, the splits' classes differ, or a pack is damaged.
    """
    splits = [split for split in SPLITS if is_packed(root, split) or (root / split).is_dir()]
    report, equal, done = Report(), defaultdict[bytes, list[_Item]](list), 0
    for split in splits or [""]:
        report.images[split or root.name] = 0
        for item, digest in _digests(root, split, workers, report, decoding):
            if isinstance(digest, bytes):
                equal[digest].append(item)
            else:
                report.unreadable.append(digest)
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


def _digests(
    root: Path, split: str, workers: int, report: Report, decoding: Decoding | None
) -> Iterator[tuple[_Item, bytes | str]]:
    if split and is_packed(root, split):
        verify_pack(root, split)
        pack = read_pack(root, split, f"{root.name}/{split}", (1, 1))
        for row, image in enumerate(pack.images):
            yield _Item(split, pack.classes[pack.labels[row]], pack.name(row)), _digest(image)
        return
    if split not in ("", "train") and (root / "train").is_dir():
        same_classes(root / "train", root / split)
    tree = scan(root / split)
    report.ignored[split or root.name] = tree.ignored
    items = (_Item(split, tree.classes[label], str(tree.path(row))) for row, label in enumerate(tree.labels))
    paths = (os.fspath(tree.path(row)) for row in range(len(tree.files)))
    digest_file = partial(_digest_file, decoding)
    if not workers:
        yield from zip(items, map(digest_file, paths), strict=True)
        return
    with Pool(workers) as pool:
        yield from zip(items, pool.imap(digest_file, paths, chunksize=32), strict=True)


def _digest_file(decoding: Decoding | None, path: str) -> bytes | str:
    """Return the hash of a file's pixels, or why it cannot be decoded."""
    try:
        with reading(Path(path)):
            return _digest(EncodedImage.of(Path(path), decoding).decode().numpy())
    except UserError as error:
        return str(error)


def _digest(image: np.ndarray) -> bytes:
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()
