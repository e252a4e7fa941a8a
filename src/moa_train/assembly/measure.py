"""Measure the candidates among which a run chooses: number formats, kernels and sizes.

They are measured on the model's own first block, its largest matrix and its image size, in about a second at most on
a CPU.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa_train.data.file_source import FileSource
from moa_train.data.image import EncodedImage
from moa_train.data.source import Source
from moa_train.engine.state import TrainState
from moa_train.interfaces import Classifier
from moa_train.model.attention import BiasedAttention
from moa_train.model.layers import DropPath
from moa_train.optim.muon import BatchedMuon, orthogonalize
from moa_train.plugins import is_own_code
from moa_train.runtime.device import KINDS, available_cores
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision, has_bf16
from moa_train.schema import RunConfig, image_shape

Times = Mapping[str, float]
"""Seconds by candidate."""

CLEAR = 1.1
"""A candidate that comes later in the list must be faster by this factor, because measurements this short differ by as
much. Candidates that need less memory or are more accurate come first, and bf16 on a CPU with instructions for it."""
EVAL_BATCHES = (4, 16, 64, 256)
ATTENTION = ("plain", "fused")
EMULATED = 5.0
"""If a small product takes this many times as long in bf16 as in fp32, bf16 is emulated. Real instructions were seen to
take 0.5 to 2.4 times as long for a product that small, because its overhead decides."""


def fastest(seconds: Times) -> str:
    """Return the fastest candidate; a later one must be faster by the factor `CLEAR` than every earlier one."""
    best = next(iter(seconds))
    for name, value in seconds.items():
        if value * CLEAR < seconds[best]:
            best = name
    return best


@dataclass
class Clock:
    """Times candidates in turn, on a CPU in CPU time, which depends less on other processes than the time of day."""

    device: torch.device
    seconds: float
    hopeless: float = 3.0
    """A candidate that takes this many times as long as the fastest is not called again. After the first calls, this
    holds only for those that took longer than ``seconds``."""

    def once(self, call: Callable[[], object]) -> float:
        """Return the seconds of one call, the device's work included."""
        self._wait()
        started = self.now()
        call()
        self._wait()
        return self.now() - started

    def now(self) -> float:
        """Return the time in seconds from an arbitrary start."""
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def race(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Return the shortest time of each candidate, or nothing unless there are two.

        The first call of each is a warmup, because it compiles kernels and allocates memory, most of it for the first
        candidate. It counts only for candidates that are not called again. All others are called equally often, at
        least twice, so that no first call of one is compared with a later one of another.
        """
        if len(candidates) < 2:
            return {}
        end = self.now() + self.seconds
        best = {name: self.once(call) for name, call in candidates.items()}
        limit = max(self.seconds, self.hopeless * min(best.values()))
        for turn in range(8):
            running = {name: call for name, call in candidates.items() if best[name] <= limit}
            if len(running) < 2 or (turn > 0 and self.now() > end):
                break
            for name, call in running.items():
                taken = self.once(call)
                best[name] = taken if turn == 0 else min(best[name], taken)
            limit = self.hopeless * min(best.values())
        return best

    def _wait(self) -> None:
        if self.device.type in KINDS:
            torch.accelerator.synchronize(self.device)


def measure(
    config: RunConfig,
    state: TrainState,
    wanted: list[str],
    kept: Mapping[str, Any],
    source: Source | None,
    local_world_size: int,
) -> dict[str, Times]:
    """Return the seconds of all candidates for each wanted setting that can be measured within its share of time."""
    device, times = state.precision.device, dict[str, Times]()
    if "optim.muon_precision" in wanted:
        times["optim.muon_precision"] = time_muon(state, Clock(device, 0.06))
    if device.type == "cpu":  # on GPUs, rules from measurements on them choose (docs/GPU.md)
        # Blocks of a user's own model may need more than one input, or other inputs than those of one image.
        with contextlib.suppress(*([Exception] if is_own_code(config.model.name) else [])):
            block = Block.of(state.model, config.data.image_size)
            if block is not None:
                per_image, taken = time_block(block, config, wanted, kept)
                times |= taken
                if "data.workers" in wanted and isinstance(source, FileSource):
                    step = per_image * len(state.model.layer_names())
                    cores = max(1, available_cores() // local_world_size)
                    times["data.workers"] = time_workers(time_files(source), step, cores)
    return {key: seconds for key, seconds in times.items() if seconds}


def time_muon(state: TrainState, clock: Clock) -> Times:
    """Time an iteration of Newton-Schulz on Muon's largest matrices, at most four of at most 128 x 512."""
    matrices = [
        parameter
        for part in state.optimizer.parts
        if isinstance(part, BatchedMuon)
        for group in part.param_groups
        for parameter in group["params"]
    ]
    if not matrices:
        return {}
    largest = max((tuple(matrix.shape) for matrix in matrices), key=math.prod)
    count = min(4, sum(tuple(matrix.shape) == largest for matrix in matrices))
    rows, columns = sorted(largest)
    x_NAB = torch.randn(count, min(rows, 128), min(columns, 512), device=clock.device)
    calls = {
        name: partial(orthogonalize, x_NAB, (3.4445, -4.7750, 2.0315), 1, 1e-7, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    with torch.no_grad():
        try:
            return clock.race(calls)
        except (RuntimeError, TypeError):  # a device without bf16
            return {"fp32": clock.once(calls["fp32"]), "bf16": float("inf")}


def time_files(source: FileSource) -> float:
    """Return the CPU time of reading and decoding an image."""
    started, chosen = time.process_time(), range(0, len(source), max(1, len(source) // 4))
    for index in chosen:
        with contextlib.suppress(UserError, OSError):  # the loader reports unreadable images
            EncodedImage(Path(source.name(index)).read_bytes(), source.decoding).decode()
    return (time.process_time() - started) / len(chosen)


def time_workers(read: float, step: float, cores: int) -> Times:
    """Return the seconds per image for each number of workers, given those of reading and of a training step."""
    return {str(workers): max(read / workers, step) for workers in range(1, min(8, cores) + 1)}


@dataclass
class Block:
    """A copy of a model's first block, and its input."""

    module: nn.Module
    example: Tensor
    """The input for one image; its first dimension grows with the batch."""

    @classmethod
    def of(cls, model: Classifier, image_size: Any) -> "Block | None":
        """Run the model up to its first block, to see the shape of its input."""
        names = model.layer_names()
        modules = dict(model.named_modules())
        module = modules.get(names[1]) if len(names) > 1 else None
        if module is None:
            return None
        height, width = image_shape(image_size)
        seen: list[Tensor] = []

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            raise _Stop

        handle = module.register_forward_pre_hook(stop)
        device, was_training = next(model.parameters()).device, model.training
        try:
            with torch.no_grad():
                model.eval()(torch.rand(1, 3, height, width, device=device))
        except _Stop:
            pass
        finally:
            handle.remove()
            model.train(was_training)
        return cls(copy.deepcopy(module), seen[0]) if seen and isinstance(seen[0], Tensor) else None

    def inputs(self, images: int, *, grad: bool) -> Tensor:
        """Return the input for a number of images."""
        return self.example.repeat(images, *[1] * (self.example.dim() - 1)).requires_grad_(grad)

    def train(self, x: Tensor, autocast: AbstractContextManager[object]) -> None:
        """Run forward and backward pass."""
        with autocast:
            out = self.module.train()(x)
        out.float().sum().backward()
        self.module.zero_grad()

    @torch.no_grad()
    def infer(self, x: Tensor, autocast: AbstractContextManager[object]) -> None:
        """Run the forward pass of an evaluation."""
        with autocast:
            self.module.eval()(x)

    def layers(self, kind: type[nn.Module]) -> list[Any]:
        """Return all layers of a kind."""
        return [module for module in self.module.modules() if isinstance(module, kind)]


class _Stop(Exception):  # noqa: N818 it is no error
    """Raised to leave a model at its first block."""


def time_block(
    block: Block, config: RunConfig, wanted: list[str], kept: Mapping[str, Any]
) -> tuple[float, dict[str, Times]]:
    """Time a block of the model in training and in evaluation, with its own attention and stochastic depth.

    Returns:
        The seconds per image in training, and the seconds of all candidates.
    """
    clock, times = Clock(torch.device("cpu"), 0.2, hopeless=1.5), dict[str, Times]()
    attention, drops = block.layers(BiasedAttention), block.layers(DropPath)

    def train(x: Tensor, precision: str, kernel: str = "auto", method: str = "auto") -> None:
        for layer in attention:
            layer.kernel = kernel
        for drop in drops:
            drop.method = method
        block.train(x, _autocast(precision))

    one = block.inputs(1, grad=True)
    single = min(clock.once(lambda: train(one, "fp32")) for _ in range(2))
    if single > 0.06:
        return single, {}  # a large model on a slow machine: the rules of the hardware choose
    images, most = 1, config.engine.micro_batch_size or config.engine.batch_size
    taken = single
    while taken < 0.008 and images < most:  # with few images, the overhead of calls would decide
        images = min(4 * images, most)
        call = partial(train, block.inputs(images, grad=True), "fp32")
        taken = min(clock.once(call) for _ in range(2))
    per_image = taken / images
    if taken < 0.03:  # formats and kernels differ more for many images, because of caches and matrix instructions
        images = min(4 * images, most)
    x = block.inputs(images, grad=True)

    precision, kernel = kept.get("runtime.precision", config.runtime.precision), "auto"
    if precision == "auto" and "runtime.precision" in wanted:
        # Without instructions for it, bf16 is emulated, 10 to 100 times as slowly. A small product finds out.
        times["runtime.precision"] = _time_product(clock)
        if times["runtime.precision"]["bf16"] < EMULATED * times["runtime.precision"]["fp32"]:
            forms = ("bf16", "fp32") if has_bf16(clock.device) else ("fp32", "bf16")
            times["runtime.precision"] = clock.race({form: partial(train, x, form) for form in forms})
        precision = fastest(times["runtime.precision"])
    if "runtime.attention" in wanted and attention:
        times["runtime.attention"] = clock.race({name: partial(train, x, precision, name) for name in ATTENTION})
        kernel = fastest(times["runtime.attention"])
        per_image = times["runtime.attention"][kernel] / images
    if "runtime.stochastic_depth" in wanted and config.model.drop_path > 0:
        for drop in drops:
            drop.rate = config.model.drop_path / 2  # the mean of all blocks, because rates rise linearly from 0
            drop.keep.fill_(1 - drop.rate)
        if drops:
            times["runtime.stochastic_depth"] = Clock(clock.device, 0.06).race(
                {method: partial(train, x, precision, kernel, method) for method in ("select", "mask")}
            )
    return per_image, times | _time_evaluation(block, config, wanted, per_image)


def _time_evaluation(block: Block, config: RunConfig, wanted: list[str], per_image: float) -> dict[str, Times]:
    clock, times = Clock(torch.device("cpu"), 0.04), dict[str, Times]()
    attention = block.layers(BiasedAttention)
    precision = config.runtime.eval_precision

    def infer(x: Tensor, kernel: str) -> None:
        for layer in attention:
            layer.eval_kernel = kernel
        block.infer(x, _autocast(precision))

    x = block.inputs(max(1, int(0.012 / per_image)), grad=False)
    kernel = "auto"
    if "runtime.eval_attention" in wanted and attention:
        times["runtime.eval_attention"] = clock.race({name: partial(infer, x, name) for name in ATTENTION})
        kernel = fastest(times["runtime.eval_attention"])
    if "engine.eval_batch_size" in wanted:
        sizes = [size for size in EVAL_BATCHES if size * per_image / 3 < 0.03] or [EVAL_BATCHES[0]]
        calls = {size: partial(infer, block.inputs(size, grad=False), kernel) for size in sizes}
        times["engine.eval_batch_size"] = {
            str(size): min(clock.once(call) for _ in range(2)) / size for size, call in calls.items()
        }
    return times


def _time_product(clock: Clock) -> Times:
    x = torch.randn(128, 128)
    matrices = {"fp32": x, "bf16": x.bfloat16()}
    return {name: min(clock.once(partial(torch.mm, y, y)) for _ in range(5)) for name, y in matrices.items()}


def _autocast(precision: str) -> AbstractContextManager[object]:
    if precision == "auto":
        precision = Precision.resolve("auto", torch.device("cpu")).name
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
