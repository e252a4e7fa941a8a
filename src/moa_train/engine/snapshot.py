"""Copy the state at one step to host memory, and write it to disk as a checkpoint."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moa_train.engine.manifest import MANIFEST, PARTS, compose, fsync_folder
from moa_train.engine.tensorfile import write_tensors
from moa_train.runtime import faults
from moa_train.runtime.device import copies_overlap
from moa_train.runtime.files import write_flushed


@dataclass(frozen=True)
class Snapshot:
    """Hold the state after ``step`` optimizer steps. See `CheckpointStore.save` for the fields."""

    step: int
    score: float | None
    tensors: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    state: bytes
    copied: torch.cuda.Event | None

    @classmethod
    def take(
        cls,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        metadata: Mapping[str, str],
        score: float | None,
        copy: bool,
    ) -> Self:
        """Move the state to host memory without waiting for a GPU; with ``copy``, training may continue meanwhile."""
        assert {"model"} <= set(tensors) <= set(PARTS), f"a checkpoint consists of {PARTS}, not {list(tensors)}"
        text = (json.dumps(state, indent=1) + "\n").encode()
        host = {part: {name: _to_host(t, copy) for name, t in named.items()} for part, named in tensors.items()}
        copied = None
        if any(tensor.is_cuda for named in tensors.values() for tensor in named.values()):
            copied = torch.cuda.Event()
            copied.record()  # after all copies; later updates of the tensors run after this event
        return cls(
            step, score if score is not None and math.isfinite(score) else None, host, dict(metadata), text, copied
        )

    @property
    def bytes(self) -> int:
        """The approximate size on disk."""
        tensors = (tensor for named in self.tensors.values() for tensor in named.values())
        return len(self.state) + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def write(self, folder: Path) -> None:
        """Create ``folder``, write all files, the manifest last, and flush them to disk. Raises OSError."""
        if self.copied is not None:
            self.copied.synchronize()
        folder.mkdir(exist_ok=True)
        files: dict[str, tuple[int, str]] = {}
        for part, named in self.tensors.items():
            name = f"{part}.safetensors"
            files[name] = write_tensors(folder / name, named, self.metadata if part in ("model", "ema") else None)
        write_flushed(folder / "state.json", self.state)
        files["state.json"] = (len(self.state), hashlib.sha256(self.state).hexdigest())
        faults.point("checkpoint.before_manifest")
        write_flushed(folder / MANIFEST, compose(self.step, self.score, files))
        fsync_folder(folder)


def _to_host(tensor: Tensor, copy: bool) -> Tensor:
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone() if copy else tensor
    return tensor.to("cpu", non_blocking=copies_overlap(tensor.device))  # torch places the copy in pinned memory
