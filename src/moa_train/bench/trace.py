"""Trace training steps: where their time goes, by kind of operation and by part of the model.

Steps run with one thread and are measured in CPU time, which other processes affect little. An operation of the
backward pass belongs to the module whose forward pass it differentiates.
"""

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import nn

from moa_train.bench import plain
from moa_train.bench.job import Job
from moa_train.bench.step import Entrant, our_model, peer_model
from moa_train.bench.tables import Row, Table
from moa_train.model.without_memory import LightMode
from moa_train.optim.clip import clip_gradients
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.schema import image_shape

KINDS = {
    "matrix products": "mm addmm bmm baddbmm convolution convolution_backward",
    "layer norm": "native_layer_norm native_layer_norm_backward",
    "GELU": "gelu gelu_backward",
    "softmax": "_softmax _softmax_backward_data",
    "casts": "_to_copy",
    "copies": "clone copy_ cat stack roll index_select unfold_backward constant_pad_nd slice_backward select_backward",
    "sums": "sum mean index_add index_add_",
    "additions, multiplications": "add add_ mul mul_ div div_ sub addcmul lerp lerp_",
}
"""Operations of each kind; all others count as other operations."""
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
Seconds = defaultdict[tuple[str, str], float]
"""CPU seconds by kind and part."""
UPDATE, BETWEEN = "loss, clipping, optimizer", "between operations"


class Trace(LightMode):
    """Add up the CPU seconds of operations by kind and part of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seconds: Seconds = defaultdict(float)
        self.running = [UPDATE]  # innermost part last
        self.starts: list[tuple[int, str]] = []  # the part of all autograd nodes from a number on
        self.hooks = []
        for name, module in model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(partial(self._enter, part_of(name))))
            self.hooks.append(module.register_forward_hook(self._leave))

    def _enter(self, part: str, *_: Any) -> None:
        self.running.append(part)
        self.starts.append((torch.autograd._get_sequence_nr(), part))

    def _leave(self, *_: Any) -> None:
        self.running.pop()
        self.starts.append((torch.autograd._get_sequence_nr(), self.running[-1]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node, part = torch._C._current_autograd_node(), self.running[-1]
        if node is not None:
            place = bisect_right(self.starts, node._sequence_nr(), key=lambda start: start[0])
            part = self.starts[place - 1][1]
        started = time.thread_time()
        result = func(*args, **(kwargs or {}))
        kind = KIND_OF.get(func.overloadpacket.__name__, "other operations")
        self.seconds[kind, part] += time.thread_time() - started
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()


def part_of(module: str) -> str:
    """Return the part to which a module belongs by its name, such as attn for layers.0.blocks.1.attn.qkv."""
    containers = ("", "layers", "blocks", "stages", "features")
    names = [name for name in module.split(".") if not name.isdigit() and name not in containers]
    return names[0] if names else "windows, residuals"


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check precisions and models; return a function that yields two tables for each precision and batch size."""
    if job.device.type != "cpu":
        raise UserError("The part trace measures CPU time. On a GPU, use tracking.profile_steps of moa-train.")
    precisions = [Precision.resolve(name, job.device) for name in job.precisions or [job.config.runtime.precision]]
    batches = job.batches or [job.config.engine.micro_batch_size or job.config.engine.batch_size]
    entrants = [our_model(job, job.config, False), *(peer_model(job, text) for text in job.against if "/" in text)]

    def measure() -> Iterator[Table]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for precision, batch in product(precisions, batches):
                yield from _trace(job, entrants, precision, batch)
        finally:
            torch.set_num_threads(threads)

    return measure


def _trace(job: Job, entrants: list[Entrant], precision: Precision, batch: int) -> Iterator[Table]:
    size = image_shape(job.config.data.image_size)
    inputs = [(torch.randn(batch, 3, *size), torch.rand(batch, job.num_classes).softmax(dim=1))]
    clip = partial(clip_gradients, config=job.config.optim)
    steps: dict[str, tuple[nn.Module, Callable[[], None]]] = {}
    for entrant in entrants:
        model, optimizer = entrant.build(precision)
        update = partial(plain.update, model.train(), optimizer, inputs, passes=1, precision=precision, clip=clip)
        update()
        steps[entrant.name.partition(":")[0]] = model, update
    rounds: dict[str, list[Seconds]] = {name: [] for name in steps}
    for _ in range(job.rounds):
        for name, (model, step) in steps.items():
            started = time.thread_time()
            step()
            total = time.thread_time() - started
            with Trace(model) as trace:
                step()
            trace.seconds[BETWEEN, BETWEEN] = total - sum(trace.seconds.values())
            rounds[name].append(trace.seconds)
    title = f"{precision.name}, batch {batch}, {size[0]} x {size[1]}, CPU time of a training step with one thread"
    yield Table("trace", f"{title}, by kind of operation", _rows(rounds, 0))
    yield Table("trace", f"{title}, by part of the model", _rows(rounds, 1))


def _rows(rounds: dict[str, list[Seconds]], place: int) -> list[Row]:
    """Return a row for each kind (``place`` 0) or part (1), with our times as values and the peers' as facts."""

    def milliseconds(name: str, key: str | None) -> list[float]:
        return [1e3 * sum(s for keys, s in taken.items() if key in (None, keys[place])) for taken in rounds[name]]

    ours, *peers = rounds
    found = dict.fromkeys(keys[place] for all_taken in rounds.values() for taken in all_taken for keys in taken)
    rows = [
        Row(key or "total", "ms", milliseconds(ours, key), {peer: median(milliseconds(peer, key)) for peer in peers})
        for key in (*found, None)
    ]
    return sorted(rows, key=lambda row: -row.median)
