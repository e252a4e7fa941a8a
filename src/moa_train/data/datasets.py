"""Class-folder trees of a data set's splits: listed, and packed where the images are small."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moa_train.data.image import Decoding, EncodedImage, reading
from moa_train.data.pack import is_packed, packed_classes, write_pack
from moa_train.data.tree import ClassTree, check_plausible, class_folders, compare_classes, scan
from moa_train.runtime.errors import UserError

_log = logging.getLogger(__name__)


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
    _log.info("Packing the %d images of %s into %s (only once)", len(tree.files), tree.root, root)
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
