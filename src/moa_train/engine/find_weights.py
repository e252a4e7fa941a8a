"""Find weights in a run folder, a checkpoint folder, a folder from a model hub, or a single file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.manifest import MANIFEST, Checkpoint
from moa_train.engine.tensorfile import CheckpointError, read_tensors

WEIGHTS = ("model.safetensors", "ema.safetensors")
HUB = ("model.safetensors", "config.json")
"""Files in a folder from a model hub. A checkpoint whose manifest is missing has no config.json."""


@dataclass(frozen=True)
class FoundWeights:
    """Represent weights on disk: the file, its checkpoint (if any), and a description for users."""

    path: Path
    checkpoint: Checkpoint | None
    description: str

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return ({name: CPU tensor}, metadata in the file's header), verified if a manifest exists."""
        tensors, metadata = self.checkpoint.weights(self.path.stem) if self.checkpoint else read_tensors(self.path)
        # A file for another library may omit the name of the submodule that is that library's model.
        prefix = metadata.pop("prefix", "")
        return {prefix + name: tensor for name, tensor in tensors.items()}, metadata


def find_weights(path: Path, parts: Sequence[str] = ("ema", "model")) -> FoundWeights:
    """Find the weights to which a run folder, a checkpoint folder, a folder from a hub, or a weights file refers.

    In a run folder, the best checkpoint is used, or the newest if none was evaluated. In a checkpoint, the first of
    ``parts`` that exists is used; by default, EMA weights are preferred.

    Raises:
        CheckpointError: there are no such weights.
    """
    path = resolve_link(path)
    if len(parts) == 1 and (path.is_file() or _is_hub(path)) and path.name != f"{parts[0]}.safetensors":
        raise CheckpointError(f"{path} holds one set of weights, so weights={parts[0]} selects nothing. Leave it out.")
    if path.is_file():
        if path.name == "optimizer.safetensors":
            raise CheckpointError(
                f"{path} is the optimizer's state. Give model.safetensors or ema.safetensors instead."
            )
        if path.name in WEIGHTS and (path.parent / MANIFEST).is_file():
            checkpoint = Checkpoint.open(path.resolve().parent)
            return FoundWeights(path, checkpoint, f"{path.name} of step {checkpoint.step}")
        return FoundWeights(path, None, f"the file {path.name}")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist. Give a run folder, a checkpoint folder or a .safetensors file.")
    if (path / MANIFEST).is_file():
        found, which = Checkpoint.open(path.resolve()), "checkpoint"
    elif _is_hub(path):
        return FoundWeights(path / "model.safetensors", None, f"the folder {path.name}")
    else:
        found, which = _of_run(path)
    part = next((part for part in parts if part in found), None)
    if part is None:
        raise CheckpointError(f"{found.path} has no {' or '.join(parts)} weights.")
    kind = "EMA weights" if part == "ema" else "weights"
    return FoundWeights(found.path / f"{part}.safetensors", found, f"{kind} of the {which}, step {found.step}")


def _is_hub(path: Path) -> bool:
    return not (path / MANIFEST).is_file() and all((path / name).is_file() for name in HUB)


def resolve_link(path: Path) -> Path:
    """Replace ``checkpoints/last`` or ``checkpoints/best`` in a path by the newest or the best checkpoint.

    Both are links, but a copy of a run may contain folders instead, which become outdated when the run continues.
    """
    absolute = path.absolute()
    for link in (absolute, absolute.parent):
        if link.name in ("last", "best") and link.parent.name == "checkpoints":
            store = CheckpointStore(link.parent.parent)
            found = store.newest() if link.name == "last" else store.best()
            if found is not None:
                return found.path / absolute.relative_to(link)
    return path


def _of_run(path: Path) -> tuple[Checkpoint, str]:
    store = CheckpointStore(path.parent if path.name == "checkpoints" else path)
    if (best := store.best()) is not None:
        return best, "best checkpoint"
    if (newest := store.newest()) is not None:
        return newest, "newest checkpoint"
    raise CheckpointError(
        f"{path} contains no checkpoint (checkpoints/step-.../{MANIFEST}). Give another folder or a file."
    )
