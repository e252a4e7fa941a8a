"""Write safetensors files and hash them in the same pass, and read them without executing any code.

The layout (https://huggingface.co/docs/safetensors) is: 8 bytes with the length of the header (little endian); the
header, which is JSON of the form {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}} padded with spaces to
a multiple of 8; and the tensors, one after another without gaps.
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
"""Bytes that are written and hashed at a time. Both operations release the GIL, so training continues meanwhile."""
HEADER_LIMIT = 100 * 2**20
"""Maximum size of a header in bytes, as in the safetensors library."""
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
    """Report that a checkpoint or weights file is damaged, missing, of the wrong kind, or could not be written."""


class UnreadableError(CheckpointError):
    """Report that a checkpoint cannot be read. It may still be valid, so it must not be removed or replaced."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"Cannot read {path}: {error.strerror}. Check the storage, then run the same command again.")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write CPU tensors of any strides and flush the file to disk. Tensors that share memory are each written in full.

    Returns the size in bytes and the SHA-256 (hex) of the intended content, computed from memory. Raises OSError; the
    caller is responsible for removing the partial file.
    """
    # Large element sizes come first, as in the library, so that each tensor is aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        assert tensor.dtype in _DTYPES, f"{name}: {tensor.dtype} cannot be stored"
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
    """Read a safetensors file and return ({name: CPU tensor that owns its memory}, metadata).

    Sizes are checked before memory is allocated. Raises CheckpointError if the file is not a valid safetensors file.
    """
    _check_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        # The library maps the file into memory. Copies stay intact if the file is truncated later.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}, metadata
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}.") from error


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
            f"{path} is a pickle (or an archive that contains one), and loading a pickle can execute code. Weights are "
            "read only from .safetensors files. Convert the file first (moa-model --help)."
        )
    raise CheckpointError(
        f"{path} is not a valid safetensors file: its header claims {length} bytes, but the file has {size}."
    )
