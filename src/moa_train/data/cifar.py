"""CIFAR-10 and CIFAR-100 from their archives (Krizhevsky 2009).

The archives are the binary versions (records of label bytes and pixels), because the Python versions are pickles.
They are read without extraction, and only if they have the SHA-256 recorded here.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.data.dataset import DataSet
from moa_train.data.download import download
from moa_train.runtime.errors import UserError

if TYPE_CHECKING:
    import tarfile

    from moa_train.data.source import Source

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """Address and layout of an archive.

    Attributes:
        url: address of the archive.
        sha256: its SHA-256.
        splits: members that hold the records of each split.
        names: member that lists the classes.
        label_bytes: number of bytes before the pixels; the last one is the class.
    """

    url: str
    sha256: str
    splits: dict[str, tuple[str, ...]]
    names: str
    label_bytes: int

    @property
    def filename(self) -> str:
        """Name of the archive's file."""
        return self.url.rpartition("/")[2]


class Cifar(DataSet):
    """Images of 32 x 32 pixels: a pack, class folders, or the original archive, which can be downloaded."""

    archive: Archive
    num_classes: int
    downloads = True
    holds_out_by_name = False  # published results depend on the split by row

    def read(self, split: str) -> "Source":
        """Open the pack of a split. If there is none, create it from the class folders or the archive first."""
        from moa_train.data.image import Decoding
        from moa_train.data.pack import check_classes, check_origin, is_packed, pack_tree, read_pack
        from moa_train.data.tree import scan_split

        root, archive = self.root, self.archive
        tree = scan_split(root, split) if (root / split).is_dir() else None
        if is_packed(root, split):
            read_pack(root, split, self.name, self.image_size)  # first of all, whether it is damaged
            if tree is not None:
                check_origin(root, split, tree)
        elif tree is not None:
            check_classes(root, split, tree.classes)
            pack_tree(tree, root, split, Decoding.of(self.config))
        elif (root / archive.filename).is_file():
            pack_archive(archive, root / archive.filename, root)
        elif self.may_download(self.config):
            download(self.config.url or archive.url, root / archive.filename, archive.sha256)
            pack_archive(archive, root / archive.filename, root)
        else:
            offer = "To download it to this folder, add data.download=true. " if self.config.download is None else ""
            raise UserError(
                f"{root.absolute()} does not hold {self.name}: no pack-{split}.npy, no folder {split}/CLASS/, no "
                f"{archive.filename}. {offer}To use your own copy, set data.root to its folder."
            )
        source = read_pack(root, split, f"{self.name}/{split}", self.image_size)
        if len(source.classes) > self.num_classes:
            raise UserError(
                f"{root} holds images of {len(source.classes)} classes, but {self.name} has {self.num_classes}. Choose "
                "another data set (data=cifar100, data=folder), or set data.root to another folder."
            )
        return source


class Cifar10(Cifar):
    """60,000 images of 10 classes, 10,000 of them for testing."""

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    num_classes = 10
    archive = Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        splits={
            "train": tuple(f"cifar-10-batches-bin/data_batch_{part}.bin" for part in range(1, 6)),
            "test": ("cifar-10-batches-bin/test_batch.bin",),
        },
        names="cifar-10-batches-bin/batches.meta.txt",
        label_bytes=1,
    )


class Cifar100(Cifar):
    """60,000 images of 100 classes, 10,000 of them for testing."""

    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    num_classes = 100
    archive = Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        splits={"train": ("cifar-100-binary/train.bin",), "test": ("cifar-100-binary/test.bin",)},
        names="cifar-100-binary/fine_label_names.txt",
        label_bytes=2,
    )


def pack_archive(archive: Archive, path: Path, root: Path) -> None:
    """Write the packs of both splits of an archive.

    Raises:
        UserError: the file does not have the archive's SHA-256.
    """
    import tarfile

    import numpy as np

    from moa_train.data.pack import write_pack

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise UserError(
            f"{path} has SHA-256 {digest}, expected {archive.sha256}: the file is damaged or not the archive. "
            f"Delete it and download {archive.url}."
        )
    with tarfile.open(path) as tar:
        classes = _member(tar, archive.names).decode().split()
        for split, members in archive.splits.items():
            data = b"".join(_member(tar, name) for name in members)
            records = np.frombuffer(data, np.uint8).reshape(-1, archive.label_bytes + _PIXELS)
            labels = records[:, archive.label_bytes - 1].astype(np.int64)
            images = records[:, archive.label_bytes :].reshape(-1, 3, 32, 32)
            remedy = f"Copy {path} to a writable folder, and set data.root to that folder."
            write_pack(root, split, images, labels, classes, remedy=remedy)


def _member(tar: "tarfile.TarFile", name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()
