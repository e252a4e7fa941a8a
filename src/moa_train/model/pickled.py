"""PyTorch's own checkpoint files read as data: nothing that they name is imported, called or executed.

A `.pth` file is a program for Python's unpickler. Here a small interpreter follows the subset of its instructions that
describes objects. What the file would have had imported becomes a `Name`, what it would have had called becomes a
`Foreign` record of the name, the arguments and the state; only tensors are made, from bytes whose size is checked
first. (`torch.load(weights_only=True)` is as careful, but refuses files that hold an object of a foreign class.)
"""

import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from moa_train.runtime.errors import UserError

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of files written before PyTorch 1.6
LARGEST_PROGRAM = 64 << 20  # bytes; the instructions of real checkpoints take well below one


@dataclass(frozen=True)
class Name:
    """Something that the file would have had imported."""

    module: str
    name: str


@dataclass(eq=False)
class Foreign:
    """An object of a class that is not known here: inert, to be looked at."""

    name: Name
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """Where the elements of tensors lie in the file."""

    key: str
    dtype: torch.dtype
    elements: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class DamagedFileError(UserError):
    """The file is no PyTorch checkpoint, or was cut or changed."""


def read_checkpoint(path: Path) -> Any:
    """Return the content of a `.pth` file: dictionaries, lists, numbers, text, tensors and `Foreign` records.

    Raises:
        UserError: the file is missing, damaged, or holds instructions that checkpoints have no need of.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive)
        with path.open("rb") as stream:
            return _read_legacy(stream, path.stat().st_size)
    except UserError as error:
        raise DamagedFileError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, EOFError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise DamagedFileError(f"{path} is no PyTorch checkpoint, or is damaged ({error}).") from error


def _read_zip(archive: zipfile.ZipFile) -> Any:
    programs = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if len(programs) != 1:
        raise UserError("it is a zip archive without PyTorch's data.pkl")
    prefix = programs[0].filename.removesuffix("data.pkl")
    if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
        raise UserError("it was written on a big-endian machine, which is not supported")

    def read(storage: Storage) -> bytes:
        entry = archive.getinfo(f"{prefix}data/{storage.key}")
        # PyTorch stores, never compresses: what a compressed entry would unpack to is not known beforehand.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage.elements * storage.dtype.itemsize:
            raise UserError(f"the size of storage {storage.key} contradicts its description")
        return archive.read(entry)

    if programs[0].file_size > LARGEST_PROGRAM or programs[0].compress_type != zipfile.ZIP_STORED:
        raise UserError(f"its description takes {programs[0].file_size} bytes, too many to be one")
    content = interpret(BytesIO(archive.read(programs[0])))
    return _with_tensors(content, {storage.key: (storage, read(storage)) for storage in _storages(content)})


def _read_legacy(stream: IO[bytes], size: int) -> Any:
    if size < 32 or stream.read(2)[:1] != b"\x80":
        raise UserError("it is no PyTorch checkpoint")
    stream.seek(0)
    if interpret(stream) != LEGACY_MAGIC:
        raise UserError("it is a pickle, but not one that PyTorch wrote")
    _protocol, _machine, content, keys = (interpret(stream) for _ in range(4))
    described = {storage.key: storage for storage in _storages(content)}
    found: dict[str, tuple[Storage, bytes]] = {}
    for key in keys:
        storage = described[key]
        elements = int.from_bytes(stream.read(8), "little")
        length = storage.elements * storage.dtype.itemsize
        if elements != storage.elements or length > size - stream.tell():
            raise UserError(f"the size of storage {key} contradicts its description")
        found[key] = storage, stream.read(length)
    return _with_tensors(content, found)


def interpret(stream: IO[bytes]) -> Any:
    """Follow one pickle up to its end; the stream is left behind it."""
    machine = _Machine()
    for opcode, argument, _position in pickletools.genops(stream):
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    return machine.stack.pop()
