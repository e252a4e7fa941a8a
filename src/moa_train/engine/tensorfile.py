"""Files of tensors in the safetensors format: written in one pass that hashes them, read without executing anything.

Layout (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header (little endian), the header as
JSON, {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, padded with spaces to a multiple of 8,
then the tensors one after the other without gaps.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from moa_train.runtime import faults
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_all

CHUNK = 8 * 2**20
"""Bytes written and hashed at a time; both release the interpreter lock, so training goes on meanwhile."""
HEADER_LIMIT = 100 * 2**20
"""Bytes; the limit of the safetensors library."""
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(UserError):
    """A checkpoint or weights file that is damaged, missing, of another kind, or could not be written."""


class UnreadableError(CheckpointError):
    """A checkpoint that the system fails to read: it may be valid, and nothing may be removed in favor of another."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"Cannot read {path}: {error.strerror}. Check the storage, then run the same command again.")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write CPU tensors (of any strides; shared memory is written twice) and flush them to the disk.

    Returns the size in bytes and the SHA-256 in hex of what was meant to be written, computed from memory. Raises
    OSError, and leaves the partial file to the caller.
    """
    # Wide elements first, as the library has it: each tensor then starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        assert tensor.dtype in _DTYPES, f"{name} is of {tensor.dtype}, which is not stored"
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        size = _write(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text), digest)
        for name in names:
            size += _write(file.fileno(), _bytes_of(tensors[name]), digest)
            faults.point("checkpoint.mid_write")
        faults.point("checkpoint.before_fsync")
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().contiguous().reshape(-1)  # view() cannot change the element size of a 0-dim tensor
    return flat.view(torch.uint8).numpy().data


def _write(descriptor: int, data: memoryview, digest: "hashlib._Hash") -> int:
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK]
        digest.update(chunk)
        write_all(descriptor, chunk)
    return len(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file into ({name: CPU tensor that owns its memory}, metadata).

    Raises CheckpointError for anything else than a sound safetensors file; sizes are checked before memory is taken.
    """
    _check_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        # The library maps the file; copies stay whole when somebody truncates it.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}, metadata
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}.") from error


def _check_header(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UnreadableError(path, error) from error
    length = int.from_bytes(start[:8], "little")
    if size > 9 and length <= min(size - 8, HEADER_LIMIT) and start[8:] == b"{":
        return
    if path.suffix in PICKLES or start.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{path} is a pickle (or an archive with one), and loading a pickle can execute code. Weights are read "
            "from .safetensors files only; convert it first (moa-model --help)."
        )
    raise CheckpointError(
        f"{path} is not a sound safetensors file: its header would take {length} bytes, and the file has {size}."
    )
