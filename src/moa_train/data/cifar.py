"""CIFAR-10 and CIFAR-100 from their archives (Krizhevsky 2009).

The archives are the binary versions (records of label bytes and pixels), because the Python versions are pickles.
They are read without extraction, and only if they have the MD5 published on
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.data.dataset import DataSet
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
        md5: its MD5.
        splits: members that hold the records of each split.
        names: member that lists the classes.
        label_bytes: number of bytes before the pixels; the last one is the class.
    """

    url: str
    md5: str
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
            if tree is not None:
                check_origin(root, split, tree)
        elif tree is not None:
            check_classes(root, split, tree.classes)
            pack_tree(tree, root, split, Decoding.of(self.config))
        elif (root / archive.filename).is_file():
            pack_archive(archive, root / archive.filename, root)
        elif self.config.download:
            pack_archive(archive, fetch(archive, root), root)
        else:
            raise UserError(
                f"{root} does not hold {self.name}: no pack-{split}.npy, no folder {split}/CLASS/, no "
                f"{archive.filename}. Add data.download=true to download it, or set data.root to a folder that holds "
                "one of them."
            )
        return read_pack(root, split, f"{self.name}/{split}", self.image_size)


class Cifar10(Cifar):
    """60,000 images of 10 classes, 10,000 of them for testing."""

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    num_classes = 10
    archive = Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
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
        md5="03b5dce01913d631647c71ecec9e9cb8",
        splits={"train": ("cifar-100-binary/train.bin",), "test": ("cifar-100-binary/test.bin",)},
        names="cifar-100-binary/fine_label_names.txt",
        label_bytes=2,
    )


def fetch(archive: Archive, root: Path) -> Path:
    """Download an archive into ``root``.

    Raises:
        UserError: there is no network, or the downloaded file is not the archive. The message says which file to
            download and where to put it.
    """
    from torchvision.datasets.utils import download_url

    partial = root / f".{archive.filename}.{os.getpid()}"
    try:
        download_url(archive.url, str(root), partial.name, archive.md5)
        partial.replace(root / archive.filename)  # only a complete download gets the final name
    except (OSError, RuntimeError) as error:  # no network, or a wrong MD5
        raise UserError(
            f"{archive.url} could not be downloaded ({error}). Download it on another machine (MD5 {archive.md5}) and "
            f"copy it to {root / archive.filename}. The next run will use it."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return root / archive.filename


def pack_archive(archive: Archive, path: Path, root: Path) -> None:
    """Write the packs of both splits of an archive.

    Raises:
        UserError: the file does not have the archive's MD5.
    """
    import tarfile

    import numpy as np

    from moa_train.data.pack import write_pack

    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    if md5 != archive.md5:
        raise UserError(
            f"{path} has MD5 {md5}, expected {archive.md5}: the file is damaged or not the archive. Delete it and "
            f"download {archive.url}."
        )
    with tarfile.open(path) as tar:
        classes = _member(tar, archive.names).decode().split()
        for split, members in archive.splits.items():
            data = b"".join(_member(tar, name) for name in members)
            records = np.frombuffer(data, np.uint8).reshape(-1, archive.label_bytes + _PIXELS)
            labels = records[:, archive.label_bytes - 1].astype(np.int64)
            images = records[:, archive.label_bytes :].reshape(-1, 3, 32, 32)
            write_pack(root, split, images, labels, classes)


def _member(tar: "tarfile.TarFile", name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()
