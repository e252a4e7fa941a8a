"""The cost of a model before it runs: feature maps, parameters, multiply-accumulates, memory of a training step.

Everything is computed on tensors without memory, so a model of any size is described in seconds.
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from moa_train.model.registry import create_model
from moa_train.model.without_memory import LightMode, WithoutMemory
from moa_train.schema import ModelConfig


@dataclass(frozen=True)
class Summary:
    """A model in numbers. Parts are keyed by (stage or -1, name); multiply-accumulates are those of one image.

    The part ``model`` is what the model computes itself, outside of its modules.
    """

    maps: Sequence[tuple[int, ...]]  # (C, H, W) of every stage
    parameters: dict[tuple[int, str], int]
    macs: dict[tuple[int, str], int]  # of all parts, also those without parameters

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters.values())

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of one image's forward pass."""
        return sum(self.macs.values())

    def table(self) -> str:
        """Return the summary as a table with a row for every part."""
        lines = [f"{'stage':<7}{'map':<18}{'part':<14}{'parameters':>14}{'MACs an image':>16}"]
        for key in self.macs:
            stage, part = key
            where = f"{stage}" if stage >= 0 else ""
            shape = " x ".join(map(str, self.maps[stage])) if stage >= 0 else ""
            count = self.parameters.get(key, 0)
            lines.append(f"{where:<7}{shape:<18}{part:<14}{count:>14,}{_giga(self.macs[key]):>16}")
        lines.append(f"{'total':<39}{self.total_parameters:>14,}{_giga(self.total_macs):>16}")
        return "\n".join(lines)


def summarize(config: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> Summary:
    """Describe the model that `create_model` would build, without allocating memory for it.

    Multiply-accumulates are counted by PyTorch's own counter, as half the floating-point operations of all products
    and convolutions.
    """
    maps: list[tuple[int, ...]] = []
    with WithoutMemory(), torch.device("meta"):
        model = create_model(config, image_size=image_size, num_classes=num_classes).eval().requires_grad_(False)
        image_BCHW = torch.empty(1, 3, *image_size)
        with torch.no_grad(), Macs(model) as counted:
            model(image_BCHW)
        parameters: Counter[tuple[int, str]] = Counter()  # in the model's order
        for path, parameter in model.named_parameters():
            parameters[model.part_of(path)] += parameter.numel()
        if any(stage >= 0 for stage, _ in parameters):
            maps = [tuple(map_BCHW.shape[1:]) for map_BCHW in model.forward_features(image_BCHW)]
    macs: Counter[tuple[int, str]] = Counter(dict.fromkeys(parameters, 0))
    for path, count in counted.by_module.items():
        stage, part = model.part_of(path)
        macs[stage, part or "model"] += count
    return Summary(maps, dict(parameters), dict(macs))


class Macs(LightMode):
    """Count the multiply-accumulates that each module of a model does itself, not those of modules it calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.by_module: Counter[str] = Counter()
        self.running = [""]  # innermost module last; a module may be called by another one than its parent
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
            module.register_forward_hook(self.leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.by_module[self.running[-1]] += count(*args, **(kwargs or {}), out_val=result) // 2
        return result

    def leave(self, *_: Any) -> None:
        """Note that the innermost running module has returned."""
        self.running.pop()


FREE = ("empty", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach")
"""Operations that compute nothing."""


class PeakMemory(LightMode):
    """Track the bytes of all tensors that are created while it is active: how many are alive, and the peak.

    Attributes:
        operations: number of operations that compute something, about one kernel each; views are not counted.
        moved: bytes that these operations read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = self.moved = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ not in FREE:
            tensors = [value for value in tree_iter((args, kwargs, result)) if isinstance(value, Tensor)]
            self.operations += 1
            self.moved += sum(value.numel() * value.element_size() for value in tensors)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until it is freed."""
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


@dataclass(frozen=True)
class TrainingCost:
    """The cost of a training step: forward and backward pass of one micro-batch, without the optimizer.

    Attributes:
        memory: peak memory in bytes, including optimizer states.
        operations: number of operations, about one kernel launch each.
        moved: bytes that the operations read and write.
    """

    memory: int
    operations: int
    moved: int


def training_cost(
    config: ModelConfig,
    *,
    image_size: tuple[int, int],
    num_classes: int,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    states: int = 2,
    device: str = "cpu",
) -> TrainingCost:
    """Estimate memory (weights, gradients, optimizer states, activations), operations and traffic of a training step.

    The step is run on tensors without memory, kernel for kernel as on ``device``, and the bytes that would be alive
    are counted. What allocators and libraries use in addition is not counted. Stochastic depth, which only saves
    memory, is switched off.

    Args:
        config: architecture.
        image_size: (height, width) in pixels.
        num_classes: width of the classifier.
        batch_size: images per forward pass.
        dtype: of matrix products, under autocast; weights stay in fp32.
        states: numbers kept per parameter: 2 for AdamW, 1 for SGD and Muon, and 1 more for EMA weights.
        device: "cpu", or "cuda" on a machine that has it.
    """
    config = replace(config, drop_path=0.0, moa=replace(config.moa, drop_path=0.0))
    with WithoutMemory(), torch.device("meta"):
        model = create_model(config, image_size=image_size, num_classes=num_classes)
    weights = sum(parameter.numel() for parameter in model.parameters())
    with WithoutMemory(device) as without, PeakMemory() as memory:
        without.hollow(model)
        images_BCHW = torch.empty(batch_size, 3, *image_size, device=device)
        labels_B = torch.empty(batch_size, dtype=torch.int64, device=device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits_BK = model(images_BCHW)
        nn.functional.cross_entropy(logits_BK.float(), labels_B).backward()
    return TrainingCost(memory.peak + 4 * states * weights, memory.operations, memory.moved)


def _giga(count: int) -> str:
    return f"{count / 1e9:.3f} G"
