"""Packs: a split of small images in one memory-mapped array, with a JSON file that describes it.

``pack-<split>.npy`` holds uint8 N C H W. ``pack-<split>.json`` holds labels, classes, the SHA-256 of the array file,
and the fingerprint and the names of the source files. Both are written under temporary names and renamed, the array
first: if the JSON file exists, the pack is complete. Processes that pack at the same time replace each other's files
with identical ones.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moa_train.data.array_source import ArraySource
from moa_train.data.image import Decoding, EncodedImage, reading
from moa_train.data.tree import ClassTree, class_folders, compare_classes
from moa_train.data.watch import map_files
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_all, write_flushed

FORMAT = 1
_log = logging.getLogger(__name__)


def pack_paths(root: Path, split: str) -> tuple[Path, Path]:
    """Return the array file and the JSON file of a split's pack."""
    return root / f"pack-{split}.npy", root / f"pack-{split}.json"


def is_packed(root: Path, split: str) -> bool:
    """Return whether the folder holds a complete pack of the split."""
    return pack_paths(root, split)[1].is_file()


def write_pack(
    root: Path,
    split: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    origin: str = "",
    files: NDArray[np.bytes_] | None = None,
    *,
    remedy: str = "Choose a folder that can be written.",
) -> None:
    """Write uint8 images N C H W with their labels as a pack.

    Args:
        root: folder; created if it does not exist.
        split: name of the split.
        images: uint8, N C H W.
        labels: int64, N.
        classes: names of the classes.
        origin: fingerprint of the class-folder tree, if the images are from one.
        files: paths of the tree's files.
        remedy: what the user can do if the pack cannot be written, a sentence.
    """
    array_path, json_path = pack_paths(root, split)
    temporary = [path.with_name(f".{path.name}.{os.getpid()}") for path in (array_path, json_path)]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with temporary[0].open("wb") as file:
            images = np.ascontiguousarray(images, np.uint8)
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(images))
            file.flush()
            write_all(file.fileno(), images.data)  # np.save does not report a full disk
            os.fsync(file.fileno())
        description = {
            "format": FORMAT,
            "shape": list(images.shape),
            "sha256": file_sha256(temporary[0]),
            "origin": origin,
            "classes": list(classes),
            "labels": np.asarray(labels).tolist(),
            "files": None if files is None else [os.fsdecode(name) for name in files.tolist()],
        }
        write_flushed(temporary[1], json.dumps(description).encode())
        for source, target in zip(temporary, (array_path, json_path), strict=True):
            source.replace(target)
    except OSError as error:
        raise UserError(f"{root}: the pack of {split!r} cannot be written ({error.strerror}). {remedy}") from error
    finally:
        for path in temporary:
            if path.exists():
                path.unlink()


def pack_tree(tree: ClassTree, root: Path, split: str, decoding: Decoding | None = None) -> None:
    """Decode a class-folder tree of small images of one size, and write it as a pack.

    Raises:
        UserError: an image is unreadable or differs in size from the first, or the pack cannot be written.
    """
    _log.info("Packing the %d images of %s into %s (needed only once)", len(tree.files), tree.root, root)
    images: np.ndarray | None = None
    paths = [os.fspath(tree.path(row)) for row in range(len(tree.files))]
    decoded = map_files(partial(_decode, decoding), paths, 1, (decoding or Decoding()).max_seconds)
    for row, (path, image) in enumerate(zip(paths, decoded, strict=True)):
        if isinstance(image, UserError):
            raise image
        if images is None:
            images = np.empty((len(tree.files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels, the first image is {images.shape[3]} x "
                f"{images.shape[2]}, but a pack requires one size. Use data=folder for images of any size."
            )
        images[row] = image
    assert images is not None  # scan never returns an empty tree
    remedy = f"Write it to another folder, and train with it: moa-data pack {tree.root.parent} OUT, then data.root=OUT."
    write_pack(root, split, images, tree.labels, tree.classes, tree.fingerprint, tree.files, remedy=remedy)


def _decode(decoding: Decoding | None, path: str) -> NDArray[np.uint8] | UserError:
    try:
        with reading(Path(path)):
            return EncodedImage.of(Path(path), decoding).decode().numpy()
    except UserError as error:
        return error  # not raised, because an exception from another process has a traceback as its message


def read_pack(root: Path, split: str, title: str, image_size: tuple[int, int]) -> ArraySource:
    """Open a pack, memory-mapped.

    Raises:
        UserError: the files are damaged, do not belong together or have a different format.
    """
    array_path, json_path = pack_paths(root, split)
    try:
        facts = json.loads(json_path.read_text())
        labels = np.asarray(facts["labels"], np.int64)
        classes = [str(name) for name in facts["classes"]]
        shape, checksum, version = tuple(facts["shape"]), str(facts["sha256"]), facts["format"]
        names = facts.get("files")  # packs of older versions have none
        files = None if names is None else np.array([os.fsencode(name) for name in names])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(json_path, f"does not describe a pack ({error!r})") from error
    if version != FORMAT:
        raise _damaged(json_path, f"has format {version}, but this version reads format {FORMAT}")
    try:
        images = np.load(array_path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(array_path, f"cannot be read ({error})") from error
    if images.dtype != np.uint8 or images.shape != shape or len(shape) != 4 or shape[1] not in (1, 3):
        raise _damaged(array_path, f"holds {images.dtype} {images.shape}, but its description says uint8 {shape}")
    if files is not None and len(files) != len(images):
        raise _damaged(json_path, f"has {len(files)} file names for {len(images)} images")
    if len(labels) != len(images) or (len(labels) and not 0 <= labels.min() <= labels.max() < len(classes)):
        raise _damaged(json_path, f"has {len(labels)} labels of {len(classes)} classes for {len(images)} images")
    return ArraySource(title, images, labels, classes, image_size, content=checksum, files=files)


def packed_classes(root: Path, split: str) -> list[str]:
    """Return the classes of a pack, without its images."""
    return read_pack(root, split, split, (1, 1)).classes


def check_classes(root: Path, split: str, classes: Sequence[str]) -> None:
    """Check that a split has the same classes as train in the same folder, whether train is packed or not.

    Raises:
        UserError: the names or their order differ.
    """
    if is_packed(root, "train"):
        compare_classes(str(root / "train"), packed_classes(root, "train"), str(root / split), classes)
    elif (root / "train").is_dir():
        compare_classes(str(root / "train"), class_folders(root / "train"), str(root / split), classes)


def check_origin(root: Path, split: str, tree: ClassTree) -> None:
    """Check that a pack was created from the files of the class-folder tree next to it.

    Raises:
        UserError: it was created from different files, or files were added, removed or renamed since. The message lists
            some of them.
    """
    facts = json.loads(pack_paths(root, split)[1].read_text())
    if facts.get("origin") == tree.fingerprint:
        return
    before, now = set(facts.get("files") or ()), {os.fsdecode(name) for name in tree.files.tolist()}
    changes = [
        f"{len(names):,} {what}: {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("added", now - before), ("removed", before - now))
        if before and names
    ]
    raise _damaged(
        pack_paths(root, split)[1],
        f"was not created from the files now in {root / split}" + (f" ({'; '.join(changes)})" if changes else ""),
    )


def verify_pack(root: Path, split: str) -> None:
    """Compare the array file with its SHA-256.

    Raises:
        UserError: they differ.
    """
    array_path, json_path = pack_paths(root, split)
    read_pack(root, split, split, (1, 1))
    if file_sha256(array_path) != json.loads(json_path.read_text())["sha256"]:
        raise _damaged(array_path, "does not match the SHA-256 in its description")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} {what}. Delete pack-*.npy and pack-*.json in this folder and pack again (moa-data pack SRC OUT)."
    )
