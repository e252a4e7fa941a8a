"""The data sets by name, their splits kept apart."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moa_train.data.arrays import ArraySource
from moa_train.data.cifar import ARCHIVES, fetch, pack_archive
from moa_train.data.digits import open_digits
from moa_train.data.files import FileSource
from moa_train.data.image import Decoding, EncodedImage, reading
from moa_train.data.pack import check_origin, is_packed, packed_classes, read_pack, write_pack
from moa_train.data.source import Source, align
from moa_train.data.split import RULES, hold_out, hold_out_by_name
from moa_train.data.tree import (
    SPLITS,
    ClassTree,
    check_plausible,
    check_split_names,
    class_folders,
    compare_classes,
    scan,
)
from moa_train.runtime.errors import UserError, choose

DATASETS = ("digits", "cifar10", "cifar100", "imagenet", "folder")

_log = logging.getLogger(__name__)


@contextmanager
def _permitted() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or "The data set"
        raise UserError(f"{place} cannot be read: {error.strerror}. Mend it, or set data.root.") from error


@_permitted()
def open_source(
    name: str,
    *,
    split: str,
    image_size: tuple[int, int],
    root: str | Path | None = None,
    val_fraction: float = 0.0,
    download: bool = False,
    decoding: Decoding | None = None,
    rule: str = "name",
    classes: Sequence[str] | None = None,
) -> Source:
    """Open one split of a data set.

    ======== ========================================= ======================= ==========================
    name     train                                     val                     test
    ======== ========================================= ======================= ==========================
    digits   four fifths of each class                 part of train           the other fifth
    cifar*   official training images                  part of train           official test images
    imagenet root/train                                part of train           root/val, the benchmark's
    folder   root/train                                root/val, or part of it root/test
    ======== ========================================= ======================= ==========================

    ``val_fraction`` holds out a part of train: stratified, and the same for every seed of a run.

    Args:
        name: one of ``DATASETS``.
        split: one of ``SPLITS``.
        image_size: height and width of the images that loaders return.
        root: folder of the data set; ``data/NAME`` by default. digits need none.
        val_fraction: part of train that is the split ``val`` and not in the split ``train``.
        download: fetch cifar10 or cifar100 if root does not hold it.
        decoding: limits and value range of image files.
        rule: one of ``RULES``: how the images of the split ``val`` are chosen. Sources without file names, and cifar10
            and cifar100, always use the position.
        classes: those of a model that is evaluated. A test or validation split may then lack some of them; without, it
            needs the classes of train.

    Raises:
        UserError: the data is missing, empty, inconsistent or damaged, or there is no such split.
    """
    if name not in DATASETS:
        raise UserError(choose("data.name", name, DATASETS))
    if split not in SPLITS:
        raise UserError(choose("split", split, SPLITS))
    if rule not in RULES:
        raise UserError(choose("hold_out", rule, RULES))
    folder = Path(root) if root is not None else Path("data") / name
    title = f"{name}/{split}"
    if name in ("folder", "imagenet"):
        check_split_names(folder)
    own_val = name == "folder" and (is_packed(folder, "val") or (folder / "val").is_dir())
    if own_val and val_fraction:
        raise UserError(
            f"val_fraction={val_fraction}, but {folder} has a validation split of its own. "
            "Set data.val_fraction=0, or rename val/ to test/ if it is to be the test split."
        )
    if split == "test" or (split == "val" and own_val):
        source = _open(name, split, folder, title, image_size, download, decoding)
        if classes is not None:
            return align(source, classes)
        if name != "digits":
            check_classes(folder, "val" if name == "imagenet" else split, source.classes)
        return source
    train = _open(name, "train", folder, title, image_size, download, decoding)
    if val_fraction:
        if rule == "name" and train.files is not None and name not in ARCHIVES:
            kept, held = hold_out_by_name(train.files.tolist(), train.labels, val_fraction)
        else:
            kept, held = hold_out(train.labels, val_fraction)
        return train.subset(kept if split == "train" else held, title)
    if split == "val":
        raise UserError(
            f"data={name} has no validation split. Hold out a part of train, for example data.val_fraction=0.1."
        )
    return train


@_permitted()
def has_split(name: str, split: str, root: str | Path | None = None, val_fraction: float = 0.0) -> bool:
    """Return whether a data set has a split, without opening or downloading it."""
    folder = Path(root) if root is not None else Path("data") / name
    if name == "folder" and (split == "test" or (split == "val" and not val_fraction)):
        return is_packed(folder, split) or (folder / split).is_dir()
    return split != "val" or val_fraction > 0


def _open(
    name: str,
    split: str,
    root: Path,
    title: str,
    image_size: tuple[int, int],
    download: bool,
    decoding: Decoding | None,
) -> Source:
    if name == "digits":
        return open_digits(split, image_size)
    if name == "imagenet":
        return _open_files(root, "val" if split == "test" else split, title, image_size, decoding)
    if name == "folder":
        if is_packed(root, split):
            if (root / split).is_dir():
                check_origin(root, split, scan_split(root, split))
            return read_pack(root, split, title, image_size)
        return _open_files(root, split, title, image_size, decoding)
    return _open_cifar(name, split, root, title, image_size, download, decoding)


def _open_files(
    root: Path, split: str, title: str, image_size: tuple[int, int], decoding: Decoding | None
) -> FileSource:
    if not (root / split).is_dir():
        found = [other for other in SPLITS if (root / other).is_dir()]
        raise UserError(
            f"{root / split}: there is no such folder. "
            + (f"{root} has {', '.join(found)}. " if found else "Set data.root to the folder of the data set. ")
            + (f"Did you mean data.root={root.parent}? " if root.name in SPLITS and not found else "")
            + f"Images are expected as {root / split}/CLASS/NAME.jpg."
        )
    return FileSource(title, scan_split(root, split), image_size, decoding=decoding)


def _open_cifar(
    name: str,
    split: str,
    root: Path,
    title: str,
    image_size: tuple[int, int],
    download: bool,
    decoding: Decoding | None,
) -> ArraySource:
    tree = scan_split(root, split) if (root / split).is_dir() else None
    if tree is not None:
        check_classes(root, split, tree.classes)
    archive = ARCHIVES[name]
    if is_packed(root, split):
        if tree is not None:
            check_origin(root, split, tree)
    elif tree is not None:
        pack_tree(tree, root, split, decoding)
    elif (root / archive.filename).is_file():
        pack_archive(archive, root / archive.filename, root)
    elif download:
        pack_archive(archive, fetch(archive, root), root)
    else:
        raise UserError(
            f"{root} does not hold {name}: no pack-{split}.npy, no folder {split}/CLASS/, no {archive.filename}. "
            f"Add data.download=true to fetch it, or set data.root to a folder that holds one of them."
        )
    return read_pack(root, split, title, image_size)


def check_classes(root: Path, split: str, classes: Sequence[str]) -> None:
    """Check that the classes of a split are those of train in the same folder, whether train is packed or not.

    Raises:
        UserError: the names or their order differ.
    """
    if is_packed(root, "train"):
        compare_classes(str(root / "train"), packed_classes(root, "train"), str(root / split), classes)
    elif (root / "train").is_dir():
        compare_classes(str(root / "train"), class_folders(root / "train"), str(root / split), classes)


def scan_split(root: Path, split: str) -> ClassTree:
    """List the images of root/split.

    Raises:
        UserError: it is missing or empty, or its folders are not likely to be classes.
    """
    check_plausible(root / split, split)
    return scan(root / split)


def pack_tree(tree: ClassTree, root: Path, split: str, decoding: Decoding | None = None) -> None:
    """Decode a class-folder tree of equally sized small images, and write it as a pack.

    Raises:
        UserError: an image is unreadable or of another size than the first, or the pack cannot be written.
    """
    _log.info("Packing the %d images of %s into %s (once)", len(tree.files), tree.root, root)
    images: np.ndarray | None = None
    for row in range(len(tree.files)):
        path = tree.path(row)
        with reading(path):
            image = EncodedImage.of(path, decoding).decode().numpy()
        if images is None:
            images = np.empty((len(tree.files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels, the first image is {images.shape[3]} x "
                f"{images.shape[2]}: a pack needs one size. Use data=folder for images of any size."
            )
        images[row] = image
    assert images is not None  # scan never returns an empty tree
    write_pack(root, split, images, tree.labels, tree.classes, tree.fingerprint, tree.files)
