"""Class-folder trees of a data set's splits: listed, and packed where the images are small."""

import logging
from pathlib import Path

import numpy as np

from moa_train.data.image import EncodedImage, reading
from moa_train.data.pack import write_pack
from moa_train.data.tree import ClassTree, same_classes, scan
from moa_train.runtime.errors import UserError

_log = logging.getLogger(__name__)


def scan_split(root: Path, split: str) -> ClassTree:
    """List the images of root/split.

    Raises:
        UserError: it is missing or empty, or its classes are not those of root/train.
    """
    if split != "train" and (root / "train").is_dir():
        same_classes(root / "train", root / split)
    return scan(root / split)


def pack_tree(tree: ClassTree, root: Path, split: str) -> None:
    """Decode a class-folder tree of equally sized small images, and write it as a pack.

    Raises:
        UserError: an image is unreadable or of another size than the first, or the pack cannot be written.
    """
    _log.info("Packing the %d images of %s into %s (only once)", len(tree.files), tree.root, root)
    images: np.ndarray | None = None
    for row in range(len(tree.files)):
        path = tree.path(row)
        with reading(path):
            image = EncodedImage(path.read_bytes()).decode().numpy()
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
