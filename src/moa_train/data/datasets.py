"""The data sets by name, their splits kept apart."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moa_train.data.arrays import ArraySource
from moa_train.data.cifar import ARCHIVES, fetch, pack_archive
from moa_train.data.digits import open_digits
from moa_train.data.files import FileSource
from moa_train.data.image import Decoding, EncodedImage, reading
from moa_train.data.pack import check_origin, is_packed, read_pack, write_pack
from moa_train.data.source import Source
from moa_train.data.split import hold_out
from moa_train.data.tree import ClassTree, same_classes, scan
from moa_train.runtime.errors import UserError, choose

DATASETS = ("digits", "cifar10", "cifar100", "imagenet", "folder")
SPLITS = ("train", "val", "test")

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

    Parts of train are held out by ``val_fraction``: stratified, and the same whatever the run's seed.

    Args:
        name: one of ``DATASETS``.
        split: one of ``SPLITS``.
        image_size: height and width of the images that loaders make of it.
        root: folder of the data set; ``data/NAME`` by default. digits need none.
        val_fraction: part of train that is the split ``val`` and not in the split ``train``.
        download: fetch cifar10 or cifar100 if root does not hold it.
        decoding: limits and value range of image files.

    Raises:
        UserError: the data is missing, empty, inconsistent or damaged, or there is no such split.
    """
    if name not in DATASETS:
        raise UserError(choose("data.name", name, DATASETS))
    if split not in SPLITS:
        raise UserError(choose("split", split, SPLITS))
    folder = Path(root) if root is not None else Path("data") / name
    title = f"{name}/{split}"
    own_val = name == "folder" and (is_packed(folder, "val") or (folder / "val").is_dir())
    if own_val and val_fraction:
        raise UserError(
            f"val_fraction={val_fraction}, but {folder} has a validation split of its own. "
            "Set data.val_fraction=0, or rename val/ to test/ if it is to be the test split."
        )
    if split == "test" or (split == "val" and own_val):
        return _open(name, split, folder, title, image_size, download, decoding)
    train = _open(name, "train", folder, title, image_size, download, decoding)
    if val_fraction:
        kept, held = hold_out(train.labels, val_fraction)
        return train.subset(kept if split == "train" else held, title)
    if split == "val":
        raise UserError(
            f"data={name} has no validation split. Hold out a part of train, for example data.val_fraction=0.1."
        )
    return train


@_permitted()
def has_split(name: str, split: str, root: str | Path | None = None, val_fraction: float = 0.0) -> bool:
    """Say whether a data set has a split, without opening it (or fetching it)."""
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
    archive = ARCHIVES[name]
    if is_packed(root, split):
        if tree is not None:
            check_origin(root, split, tree.fingerprint)
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


def scan_split(root: Path, split: str) -> ClassTree:
    """List the images of root/split.

    Raises:
        UserError: it is missing or empty, or its classes are not those of root/train.
    """
    if split != "train" and (root / "train").is_dir():
        same_classes(root / "train", root / split)
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
    write_pack(root, split, images, tree.labels, tree.classes, origin=tree.fingerprint)
