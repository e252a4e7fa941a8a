"""Class-folder trees: root/CLASS/image.jpg, possibly with nested folders."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from moa_train.data.fingerprint import Labels, fingerprint
from moa_train.runtime.errors import UserError
from moa_train.schema import SPLITS

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .jp2 .j2k .png .bmp .gif .ppm .pgm .webp .avif .tif .tiff".split()  # noqa: SIM905 readable
)

SYSTEM_FOLDERS = frozenset(
    ["@eaDir", "#recycle", "@Recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"]
)
"""Folders with thumbnails or deleted files that storage servers and operating systems create in a tree."""

OTHER_NAMES = {
    **dict.fromkeys(["valid", "validation", "validate", "dev", "eval"], "val"),
    **dict.fromkeys(["testing", "tests"], "test"),
    **dict.fromkeys(["training"], "train"),
    **{split: split for split in SPLITS},
}
"""Names that other programs use for the splits, in lowercase."""


@dataclass(frozen=True)
class ClassTree:
    """The image files of one split.

    A class is a folder in ``root``; its index is the folder's position among the sorted names. Its samples are the
    files in this folder and its subfolders whose suffix is one of ``IMAGE_SUFFIXES`` (case-insensitive), in sorted
    order. Links to files and folders are followed. Everything else is ignored and counted: hidden files, other
    suffixes, files next to the class folders, broken links, and links to a folder that contains them. Only a broken
    link with the suffix of an image is a sample, so that training reports it instead of silently using fewer images.

    Attributes:
        root: folder of the split.
        classes: sorted names of the classes.
        files: paths relative to ``root`` in the file system's bytes, N. (An array, because every worker process would
            end up with its own copy of a million Python strings.)
        labels: int64, N.
        ignored: number of files that are ignored.
        broken: the links among them.
    """

    root: Path
    classes: list[str]
    files: NDArray[np.bytes_]
    labels: Labels
    ignored: int = 0
    broken: list[str] = field(default_factory=list)

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
    classes = class_folders(root)
    if not classes:
        flat = sum(_is_image(entry.name) for entry in os.scandir(root))
        raise UserError(
            f"{root}: no class folders"
            + (f", but {flat:,} images. Move each image into the folder of its class" if flat else "")
            + f". Images are expected as {root}/CLASS/NAME.jpg."
        )
    beside = [entry for entry in os.scandir(root) if not _is_folder(entry)]
    broken = [entry.path for entry in beside if is_broken_link(entry.path)]
    ignored = sum(entry.is_file() for entry in beside) + len(broken)
    files: list[bytes] = []
    labels: list[int] = []
    above = [_identity(folder) for folder in (root.resolve(), *root.resolve().parents)]
    for label, name in enumerate(classes):
        found = others = 0
        for path, kind in _images(root, name, above):
            if kind == "image":
                files.append(os.fsencode(path))
                found += 1
            elif kind == "system":
                raise UserError(f"{root / path}: this folder is not part of a data set. Delete or move it.")
            else:
                others += 1
                broken += [str(root / path)] if kind == "broken" else []
        if not found:
            raise UserError(
                f"{root / name}: no image in this class folder ({others} other files). Add images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}) or delete the folder."
            )
        labels += [label] * found
        ignored += others
    return ClassTree(root, classes, np.array(files), np.array(labels, np.int64), ignored, broken)


def images_below(folder: str) -> list[str]:
    """Return the paths of the images in a folder and its subfolders, as `ClassTree` does."""
    above = [_identity(parent) for parent in Path(folder).resolve().parents]
    return [str(Path(path)) for path, kind in _images(Path(), folder, above) if kind == "image"]


def scan_split(root: Path, split: str) -> ClassTree:
    """List the images of root/split.

    Raises:
        UserError: it is missing or empty, or its folders are unlikely to be classes.
    """
    check_plausible(root / split, split)
    return scan(root / split)


def class_folders(root: Path) -> list[str]:
    """Return the sorted names of the class folders."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(root: Path, folder: str, above: list[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yield (path, kind) of the files in a folder, then in its subfolders. Kind: image, other, broken or system.

    Args:
        root: folder that the paths are relative to.
        folder: path of the folder; a string, because a tree may hold a million files.
        above: identities of the folders that contain it. Following a link to one of them would never end.
    """
    here = _identity(root / folder)
    if here in above:
        yield folder, "broken"
        return
    folders = []
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        path = f"{folder}/{entry.name}"
        if _is_folder(entry):
            if entry.name in SYSTEM_FOLDERS:
                yield path, "system"
            elif not entry.name.startswith("."):
                folders.append(path)
        elif _is_image(entry.name):
            yield path, "image"
        else:
            yield path, "broken" if is_broken_link(entry.path) else "other"
    for path in folders:
        yield from _images(root, path, [*above, here])


def is_broken_link(path: str) -> bool:
    """Return whether a path is a link that leads to nothing or to itself."""
    return os.path.islink(path) and not os.path.exists(path)  # noqa: PTH110, PTH114


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return Path(entry).is_dir()  # entry.is_dir() raises an error for circular links
    return entry.is_dir()


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def check_plausible(root: Path, split: str) -> None:
    """Check that the class folders of a split are likely to be classes.

    Raises:
        UserError: there is only one class, the folders have names of splits such as train or val, or the system has
            created one of them. The message suggests a fix.
    """
    classes = class_folders(root) if root.is_dir() else []
    if system := sorted(SYSTEM_FOLDERS & set(classes)):
        raise UserError(f"{root / system[0]}: this folder is not a class. Delete it or move it elsewhere.")
    if classes and {name.lower() for name in classes} <= set(OTHER_NAMES):
        raise UserError(
            f"{root} holds only the folders {', '.join(classes)}, which look like splits, not classes. "
            f"Set data.root={root}, or move the class folders up to {root}/CLASS."
        )
    if split == "train" and len(classes) == 1:
        raise UserError(
            f"{root} has a single class, {classes[0]}: there is nothing to learn. Images are expected as "
            f"{root}/CLASS/NAME.jpg, with a folder for each of at least two classes."
        )
    forms: dict[str, str] = {}
    for name in classes:
        if (other := forms.setdefault(normalize("NFC", name), name)) != name:
            raise UserError(
                f"{root} has two class folders {name} whose names differ only in their Unicode form (NFC, NFD): "
                f"{other!a} and {name!a}. Move their images into one folder."
            )


def check_split_names(root: Path) -> None:
    """Check that no folder in ``root`` has another program's name for a split that is missing.

    Raises:
        UserError: there is one. The message gives the expected name.
    """
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        meant = OTHER_NAMES.get(path.name.lower())
        if meant and path.name not in SPLITS and path.is_dir() and not (root / meant).exists():
            raise UserError(
                f"{path}: a folder of this name is not read. Rename it to {root / meant}, or move it elsewhere if "
                "it should not be used."
            )


def compare_classes(one: str, its_classes: Sequence[str], other: str, classes: Sequence[str]) -> None:
    """Check that two sources have the same classes in the same order.

    Raises:
        UserError: they do not. The message lists some of the names that differ.
    """
    if list(its_classes) == list(classes):
        return
    differences = ((one, sorted(set(its_classes) - set(classes))), (other, sorted(set(classes) - set(its_classes))))
    what = "; ".join(
        f"only in {Path(name).name}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for name, names in differences
        if names
    )
    if sorted(normalize("NFC", name) for name in its_classes) == sorted(normalize("NFC", name) for name in classes):
        what = (
            "the names differ only in their Unicode form (NFC, NFD), as after a copy from macOS: "
            f"{', '.join(ascii(name) for _, names in differences for name in names[:1])}. Rename the folders"
            if what
            else "their order differs"
        )
    raise UserError(
        f"{one} and {other} have different classes: {what}. Labels are positions in the sorted list of classes, so "
        "every split needs the same classes."
    )
