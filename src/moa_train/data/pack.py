"""Packs: a split of small images in one memory-mapped array, with a JSON file that describes it.

``pack-<split>.npy`` holds uint8 N C H W, ``pack-<split>.json`` labels, classes and the SHA-256 of the array file.
Both are written under temporary names and renamed, the array first: a pack whose JSON exists is complete, and
processes that pack at the same time replace each other's equal files.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moa_train.data.arrays import ArraySource
from moa_train.data.image import EncodedImage, reading
from moa_train.data.tree import ClassTree
from moa_train.runtime.errors import UserError

FORMAT = 1
_log = logging.getLogger(__name__)


def pack_paths(root: Path, split: str) -> tuple[Path, Path]:
    """Return the array file and the JSON file of a split's pack."""
    return root / f"pack-{split}.npy", root / f"pack-{split}.json"


def is_packed(root: Path, split: str) -> bool:
    """Say whether the folder holds a complete pack of the split."""
    return pack_paths(root, split)[1].is_file()


def write_pack(
    root: Path,
    split: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    origin: str = "",
) -> None:
    """Write uint8 images N C H W with their labels as a pack.

    Args:
        root: folder; made if it is missing.
        split: name of the split.
        images: uint8, N C H W.
        labels: int64, N.
        classes: names of the classes.
        origin: fingerprint of what was packed.
    """
    array_path, json_path = pack_paths(root, split)
    temporary = [path.with_name(f".{path.name}.{os.getpid()}") for path in (array_path, json_path)]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with temporary[0].open("wb") as file:
            images = np.ascontiguousarray(images, np.uint8)
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(images))
            file.write(images.data)  # np.save would not notice a full disk
            file.flush()
            os.fsync(file.fileno())
        description = {
            "format": FORMAT,
            "shape": list(images.shape),
            "sha256": file_sha256(temporary[0]),
            "origin": origin,
            "classes": list(classes),
            "labels": np.asarray(labels).tolist(),
        }
        temporary[1].write_text(json.dumps(description))
        for source, target in zip(temporary, (array_path, json_path), strict=True):
            source.replace(target)
    except OSError as error:
        raise UserError(
            f"{root}: the pack of {split!r} cannot be written ({error.strerror}). Pack into a folder that can be "
            f"written, `moa-data pack {root} OUT`, and give data.root=OUT."
        ) from error
    finally:
        for path in temporary:
            if path.exists():
                path.unlink()


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


def read_pack(root: Path, split: str, title: str, image_size: tuple[int, int]) -> ArraySource:
    """Open a pack, memory-mapped.

    Raises:
        UserError: the files are damaged, do not belong together or are of another format.
    """
    array_path, json_path = pack_paths(root, split)
    try:
        facts = json.loads(json_path.read_text())
        labels = np.asarray(facts["labels"], np.int64)
        classes = [str(name) for name in facts["classes"]]
        shape, checksum, version = tuple(facts["shape"]), str(facts["sha256"]), facts["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(json_path, f"is no description of a pack ({error!r})") from error
    if version != FORMAT:
        raise _damaged(json_path, f"has format {version}, this version reads {FORMAT}")
    try:
        images = np.load(array_path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(array_path, f"cannot be read ({error})") from error
    if images.dtype != np.uint8 or images.shape != shape or len(shape) != 4 or shape[1] not in (1, 3):
        raise _damaged(array_path, f"holds {images.dtype} {images.shape}, its description says uint8 {shape}")
    if len(labels) != len(images) or (len(labels) and not 0 <= labels.min() <= labels.max() < len(classes)):
        raise _damaged(json_path, f"has {len(labels)} labels of {len(classes)} classes for {len(images)} images")
    return ArraySource(title, images, labels, classes, image_size, content=checksum)


def check_origin(root: Path, split: str, origin: str) -> None:
    """Check that a pack was made of the class-folder tree beside it.

    Raises:
        UserError: it was made of another one, or the tree has changed since.
    """
    _, json_path = pack_paths(root, split)
    if json.loads(json_path.read_text()).get("origin") != origin:
        raise _damaged(json_path, f"was not made of the files that are now in {root / split}")


def verify_pack(root: Path, split: str) -> None:
    """Compare the array file with its SHA-256.

    Raises:
        UserError: they differ.
    """
    array_path, json_path = pack_paths(root, split)
    read_pack(root, split, split, (1, 1))
    if file_sha256(array_path) != json.loads(json_path.read_text())["sha256"]:
        raise _damaged(array_path, "does not have the SHA-256 of its description")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}. Delete pack-*.npy and pack-*.json there and pack again (moa-data pack SRC OUT).")
