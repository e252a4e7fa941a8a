"""The layout of a checkpoint folder, and the manifest that verifies its content.

step-00001234/
    model.safetensors  ema.safetensors  optimizer.safetensors     tensors; ema only with EMA weights
    state.json                                                    everything else that a resume needs
    manifest.json                                                 size and SHA-256 of each file, written last
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Self

from torch import Tensor

from moa_train.engine.tensorfile import CheckpointError, UnreadableError, read_tensors
from moa_train.runtime import faults

FORMAT = 1
PARTS = ("model", "ema", "optimizer")
"""Groups of tensors; each is stored in a file ``<part>.safetensors``."""
FILES = (*(f"{part}.safetensors" for part in PARTS), "state.json")
MANIFEST = "manifest.json"
JSON_LIMIT = 64 * 2**20

_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder for ``step``."""
    return f"step-{step:08d}"


def folder_step(path: Path) -> int | None:
    """Return the step in a folder name, also one that ends in ``.replaced``, or None for any other name."""
    match = _FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Checkpoint:
    """Represent a checkpoint with a valid manifest. Each file is verified before its first read, or by `verify`."""

    path: Path
    step: int
    score: float | None
    """Score that selects the best checkpoint, higher is better; None if the checkpoint was not evaluated."""
    digest: str
    """SHA-256 of the manifest. Equal digests mean equal checkpoints."""
    files: Mapping[str, tuple[int, str]] = field(repr=False)
    """{name: (bytes, SHA-256)}"""
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the manifest of the folder ``path``. Raises CheckpointError."""
        text = _read(path / MANIFEST)
        try:
            manifest = json.loads(text)
            files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
            step, score = manifest["step"], manifest["score"]
            # The manifest's own checksum is verified by composing the manifest again, byte for byte.
            sound = text == compose(step, score, files) and type(step) is int and type(score) in (int, float, NoneType)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise CheckpointError(f"{path / MANIFEST} is damaged, or its format is not {FORMAT}.")
        if folder_step(path) not in (step, None):
            raise CheckpointError(f"{path / MANIFEST} belongs to step {step}, not to this folder.")
        if not {"model.safetensors", "state.json"} <= set(files) <= set(FILES):
            raise CheckpointError(f"{path / MANIFEST} lists the wrong files: {', '.join(files)}.")
        return cls(path, step, score, hashlib.sha256(text).hexdigest(), files)

    def verify(self) -> Self:
        """Check the size and SHA-256 of every file. Raises CheckpointError, which names the first damaged file."""
        for name in self.files:
            self._sound(name)
        return self

    def _sound(self, name: str) -> Path:
        """Verify a file against the manifest and return its path."""
        path, (size, sha256) = self.path / name, self.files[name]
        if name in self._verified:
            return path
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file.")
            if status.st_size != size:
                raise CheckpointError(f"{path} is damaged: it has {status.st_size} bytes instead of {size}.")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise CheckpointError(f"{path} is damaged: its SHA-256 does not match the manifest.")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing.") from None
        except OSError as error:
            raise UnreadableError(path, error) from error
        self._verified.add(name)
        return path

    def __contains__(self, part: str) -> bool:
        return f"{part}.safetensors" in self.files

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Verify and read the tensors of ``model``, ``ema`` or ``optimizer`` to the CPU. Raises CheckpointError."""
        return self.weights(part)[0]

    def weights(self, part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the result of `tensors` and the metadata in the file's header."""
        if part not in self:
            raise CheckpointError(f"{self.path} has no {part}.safetensors; it has {', '.join(self.files)}.")
        return read_tensors(self._sound(f"{part}.safetensors"))

    @cached_property
    def state(self) -> dict[str, Any]:
        """The verified content of state.json. Raises CheckpointError."""
        path = self._sound("state.json")
        try:
            state = json.loads(_read(path))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} is not a JSON object.")
        return state


def compose(step: int, score: float | None, files: Mapping[str, tuple[int, str]]) -> bytes:
    """Compose a manifest. Its last entry is the SHA-256 of all other entries."""
    entries = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in sorted(files.items())}
    content = {"format": FORMAT, "step": step, "score": score, "files": entries}
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": own}, indent=1) + "\n").encode()


def remove_folder(folder: Path, rest: Path | None = None) -> None:
    """Remove the files of a checkpoint, the manifest first, and then the folder if it is empty.

    Other files stay, or are moved to the folder ``rest`` unless a file of the same name exists there.
    """
    for name in (MANIFEST, *FILES):
        (folder / name).unlink(missing_ok=True)
        faults.point("checkpoint.mid_remove")
    for path in folder.iterdir() if rest else ():
        if rest and not (rest / path.name).exists():
            path.rename(rest / path.name)
    if not any(folder.iterdir()):
        folder.rmdir()


def fsync_folder(folder: Path) -> None:
    """Flush the directory entries of ``folder`` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} is not a regular file of at most {JSON_LIMIT} bytes.")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise UnreadableError(path, error) from error
