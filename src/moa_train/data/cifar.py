"""CIFAR-10 and CIFAR-100 from their archives (Krizhevsky 2009).

The archives are the binary versions, records of label bytes and pixels, because the Python versions are pickles. They
are read in place, and only if they have the MD5 published on https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moa_train.data.pack import write_pack
from moa_train.runtime.errors import UserError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """Where an archive is from and how its records look.

    Attributes:
        url: of the archive.
        md5: of the archive.
        splits: members that hold the records of each split.
        names: member that lists the classes.
        label_bytes: bytes before the pixels; the last one is the class.
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


ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        splits={
            "train": tuple(f"cifar-10-batches-bin/data_batch_{part}.bin" for part in range(1, 6)),
            "test": ("cifar-10-batches-bin/test_batch.bin",),
        },
        names="cifar-10-batches-bin/batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        splits={"train": ("cifar-100-binary/train.bin",), "test": ("cifar-100-binary/test.bin",)},
        names="cifar-100-binary/fine_label_names.txt",
        label_bytes=2,
    ),
}


def fetch(archive: Archive, root: Path) -> Path:
    """Fetch an archive into ``root``.

    Raises:
        UserError: there is no network, or what came is not the archive. Says what to fetch and where to put it.
    """
    from torchvision.datasets.utils import download_url

    partial = root / f".{archive.filename}.{os.getpid()}"
    try:
        download_url(archive.url, str(root), partial.name, archive.md5)
        partial.replace(root / archive.filename)  # only what is whole gets the name
    except (OSError, RuntimeError) as error:  # no network, or another MD5
        raise UserError(
            f"{archive.url} could not be downloaded ({error}). Fetch it elsewhere (MD5 {archive.md5}) and put it "
            f"there: {root / archive.filename}. The next start will use it."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return root / archive.filename


def pack_archive(archive: Archive, path: Path, root: Path) -> None:
    """Write the packs of both splits of an archive.

    Raises:
        UserError: the file's MD5 is not the archive's.
    """
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    if md5 != archive.md5:
        raise UserError(
            f"{path} has MD5 {md5}, expected {archive.md5}: damaged or another file. Delete it and fetch {archive.url}."
        )
    with tarfile.open(path) as tar:
        classes = _member(tar, archive.names).decode().split()
        for split, members in archive.splits.items():
            data = b"".join(_member(tar, name) for name in members)
            records = np.frombuffer(data, np.uint8).reshape(-1, archive.label_bytes + _PIXELS)
            labels = records[:, archive.label_bytes - 1].astype(np.int64)
            images = records[:, archive.label_bytes :].reshape(-1, 3, 32, 32)
            write_pack(root, split, images, labels, classes)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()
