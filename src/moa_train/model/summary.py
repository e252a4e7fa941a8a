"""What a model costs before it runs: maps, parameters, multiply-accumulates, memory of a training step.

Everything is worked out on tensors without memory, so the largest model at any size is described in seconds.
"""

import re
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from moa_train.model.registry import create_model

# Names of modules and parameters of all models -> the part that they belong to; the first pattern found counts.
PARTS = {
    "embedding": r"^(patch_embed|conv_proj|class_token|encoder\.pos_embedding|features\.0|conv1|bn1)\b",
    "MOA": r"^layers\.\d+\.(moa|glb_attn|post_conv|norm\d)\b",
    "convolutions": r"^layer\d",
    "attention": r"\b(attn|norm1|self_attention|ln_1)\b",
    "MLP": r"\b(mlp|norm2|ln_2)\b",
    "merging": r"^(layers\.\d+\.downsample|features\.[2468])\b",
    "head": r"",
}


@dataclass(frozen=True)
class Summary:
    """A model in numbers. Parts are keyed by (stage or -1, name); multiply-accumulates are those of one image."""

    maps: Sequence[tuple[int, ...]]  # (C, H, W) of every stage
    parameters: dict[tuple[int, str], int]
    macs: dict[tuple[int, str], int]

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters.values())

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of one image's forward pass."""
        return sum(self.macs.values())

    def table(self) -> str:
        """Lay the numbers out for reading: a block of rows for every stage."""
        lines = [f"{'stage':<7}{'map':<18}{'part':<14}{'parameters':>14}{'MACs an image':>16}"]
        for key in sorted(self.parameters, key=_order):
            stage, part = key
            where = f"{stage}" if stage >= 0 else ""
            shape = " x ".join(map(str, self.maps[stage])) if stage >= 0 else ""
            lines.append(f"{where:<7}{shape:<18}{part:<14}{self.parameters[key]:>14,}{_giga(self.macs[key]):>16}")
        lines.append(f"{'total':<39}{self.total_parameters:>14,}{_giga(self.total_macs):>16}")
        return "\n".join(lines)


def summarize(name: str, **fields: Any) -> Summary:
    """Describe the model that `create_model` would build, without building it.

    Multiply-accumulates are counted by PyTorch's own counter, as half the floating-point operations of all products
    and convolutions.
    """
    with torch.device("meta"):
        model = create_model(name, **fields).eval()
        image_BCHW = torch.empty(1, fields.get("in_channels", 3), *fields["image_size"])
    with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
        model(image_BCHW)
    with torch.no_grad():
        maps = [tuple(map_BCHW.shape[1:]) for map_BCHW in model.forward_features(image_BCHW)]  # type: ignore[operator]
    parameters: Counter[tuple[int, str]] = Counter()
    for path, parameter in model.named_parameters():
        parameters[part_of(path)] += parameter.numel()
    macs: Counter[tuple[int, str]] = Counter()
    for path, count in _own(counter).items():
        macs[part_of(path)] += count // 2
    return Summary(maps, dict(parameters), {key: macs[key] for key in parameters})


def _own(counter: FlopCounterMode) -> dict[str, int]:
    """Return the operations that each module does itself, outside of the modules in it."""
    total = {path.partition(".")[2]: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
    own = dict(total)
    for path, count in total.items():
        above = path
        while above:
            above = above.rpartition(".")[0]
            if above in own:
                own[above] -= count
                break
    return {path: count for path, count in own.items() if count}


def part_of(path: str) -> tuple[int, str]:
    """Return the stage (-1 outside of them) and the part that a module or parameter belongs to, by its name."""
    part = next(part for part, pattern in PARTS.items() if re.search(pattern, path))
    if part in ("embedding", "head"):
        return (-1, part)
    found = re.match(r"layers\.(\d+)|features\.(\d+)|layer(\d)|encoder\.layers", path)
    assert found is not None, path
    moa, swin, resnet = found.groups()
    return (int(moa or 0) or (int(swin or 1) - 1) // 2 or int(resnet or 1) - 1, part)


class PeakMemory(TorchDispatchMode):
    """Count the bytes of all tensors that are made while it is on, and the most that live at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, once, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def free() -> None:
            self.alive.discard(key)
            self.now -= size

        weakref.finalize(storage, free)


def training_memory(
    name: str,
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    states: int = 2,
    device: str = "cpu",
    **fields: Any,
) -> int:
    """Estimate the peak memory of a training step in bytes: weights, gradients, optimizer states, activations.

    The step is run on tensors without memory, kernel for kernel as on ``device``, and what would be alive is counted.
    What allocators and libraries take beside that is not. Stochastic depth, which only saves some, is left out.

    Args:
        name: as in `create_model`, with its ``fields``.
        batch_size: images of one forward pass.
        dtype: of the products, under autocast; weights stay in fp32.
        states: numbers that are kept beside every weight: by AdamW 2, by SGD and Muon 1, and 1 for its average.
        device: "cpu", or "cuda" on a machine that has it.
    """
    with torch.device("meta"):
        model = create_model(name, **{**fields, "drop_path": 0.0, "moa_drop_path": 0.0})
    weights = sum(parameter.numel() for parameter in model.parameters())
    with FakeTensorMode(), PeakMemory() as memory:
        _without_memory(model, device)
        images_BCHW = torch.empty(batch_size, fields.get("in_channels", 3), *fields["image_size"], device=device)
        labels_B = torch.empty(batch_size, dtype=torch.int64, device=device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits_BK = model(images_BCHW)
        nn.functional.cross_entropy(logits_BK.float(), labels_B).backward()
    return memory.peak + 4 * states * weights


def _without_memory(model: nn.Module, device: str) -> None:
    """Replace parameters and buffers by fake ones on ``device``, of the `FakeTensorMode` that is on."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=device))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _order(key: tuple[int, str]) -> tuple[bool, int, int]:
    stage, part = key
    return (
        part == "head",
        stage,
        ["embedding", "convolutions", "attention", "MLP", "MOA", "merging", "head"].index(part),
    )


def _giga(count: int) -> str:
    return f"{count / 1e9:.3f} G"
