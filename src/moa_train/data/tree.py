"""Class-folder trees: root/CLASS/image.jpg, possibly in deeper folders."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moa_train.data.fingerprint import Labels, fingerprint
from moa_train.runtime.errors import UserError

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"])


@dataclass(frozen=True)
class ClassTree:
    """The image files of one split.

    A class is a folder below ``root``, its index the folder's place among the sorted names. Its samples are the files
    with the suffix of an image (``IMAGE_SUFFIXES``, in capitals too) in it and in folders below it, in sorted order.
    Everything else is left out and counted: hidden files and folders, other suffixes, files beside the class folders.

    Attributes:
        root: folder of the split.
        classes: names of the classes, sorted.
        files: paths relative to ``root`` in the file system's bytes, N. (An array: workers that touch a million Python
            strings would each come to own a copy of them.)
        labels: int64, N.
        ignored: number of files left out.
    """

    root: Path
    classes: list[str]
    files: NDArray[np.bytes_]
    labels: Labels
    ignored: int

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.root / os.fsdecode(bytes(self.files[index]))

    @property
    def fingerprint(self) -> str:
        """Stable hash of names and labels."""
        return fingerprint("", self.classes, self.labels, self.files.tobytes())


def scan(root: Path) -> ClassTree:
    """List the images of a split.

    Raises:
        UserError: there is no such folder, it has no class folders, or one of them holds no image.
    """
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder. Images are expected as {root}/CLASS/NAME.jpg.")
    classes = _class_folders(root)
    if not classes:
        raise UserError(f"{root}: no class folders. Images are expected as {root}/CLASS/NAME.jpg.")
    ignored = sum(path.is_file() for path in root.iterdir())
    files: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found, others = _images(root / name)
        if not found:
            raise UserError(
                f"{root / name}: no image in this class folder ({others} other files). Add images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}) or delete the folder."
            )
        files += [os.fsencode(os.path.relpath(path, root)) for path in found]
        labels += [label] * len(found)
        ignored += others
    return ClassTree(root, classes, np.array(files), np.array(labels, np.int64), ignored)


def _class_folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> tuple[list[str], int]:
    found, ignored = [], 0
    for directory, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = sorted(name for name in names if _is_image(name))
        found += [os.path.join(directory, name) for name in images]  # noqa: PTH118  # a million of them
        ignored += len(names) - len(images)
    return found, ignored


def _refuse(error: OSError) -> None:
    raise error  # by itself, os.walk passes over folders that it may not read


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def same_classes(one: Path, other: Path) -> None:
    """Check that two splits have the same class folders.

    Raises:
        UserError: they have not; some of the differing names are listed.
    """
    in_one, in_other = set(_class_folders(one)), set(_class_folders(other))
    if in_one != in_other:
        differences = ((one, sorted(in_one - in_other)), (other, sorted(in_other - in_one)))
        raise UserError(
            f"{one} and {other} have different classes: "
            + "; ".join(
                f"only in {root.name}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for root, names in differences
                if names
            )
            + ". Labels are places in the sorted list of classes, so every split needs the same class folders."
        )
