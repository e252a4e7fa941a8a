"""Benchmark training steps (forward, loss, backward, clipping, optimizer) and inference, interleaved with other models.

Every model runs in the same plain loop on the same images. Our models use the kernels that a run would choose on this
machine. The tables also report the peak memory of a step, the share of the optimizer in its time, and its MFU: its
speed relative to a matrix product of the same dtype, which is also measured in every round.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moa_train.assembly.choices import apply, choose
from moa_train.assembly.training import build_state
from moa_train.bench import memory, plain
from moa_train.bench.job import Job
from moa_train.bench.peers import build_peer, check_peer
from moa_train.bench.tables import Row, Table
from moa_train.bench.timing import alternate, timed
from moa_train.model.compiling import compile_model
from moa_train.model.registry import create_model
from moa_train.optim.clip import clip_gradients
from moa_train.optim.optimizers import Optimizers
from moa_train.runtime.precision import Precision
from moa_train.schema import RunConfig, image_shape

RATE = 1e-6
"""Learning rate. It is tiny because the images are noise and the weights should barely change."""


@dataclass(frozen=True)
class Entrant:
    """A model to measure, and the multiply-accumulates of its forward pass for one image."""

    name: str
    build: Callable[[Precision], tuple[nn.Module, Optimizers]]
    macs: int
    compiled: bool = False


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check precisions and models; return a function that yields a table for each mode, precision and batch size."""
    config = job.config
    precisions = [Precision.resolve(name, job.device) for name in job.precisions or [config.runtime.precision]]
    batches = job.batches or [config.engine.micro_batch_size or config.engine.batch_size]
    ours = {recomputing: our_model(job, config, recomputing) for recomputing in job.checkpointings}
    theirs = [peer_model(job, text) for text in job.against if "/" in text]

    def measure() -> Iterator[Table]:
        for mode, precision, batch in product(job.modes, precisions, batches):
            chosen = list(ours.values()) if mode == "train" else [our_model(job, config, False)]
            entrants = [
                replace(entrant, name=f"{entrant.name} compiled" if compiled else entrant.name, compiled=compiled)
                for group in (chosen, theirs)
                for compiled, entrant in product(job.compiles, group)
            ]
            yield _compare(job, entrants, mode, precision, batch)

    return measure


def our_model(job: Job, config: RunConfig, recomputing: bool) -> Entrant:
    """Return the configured model with its optimizer."""
    config = copy.deepcopy(config)
    config.model.checkpointing, config.engine.ema_decay = recomputing, 0.0

    def build(precision: Precision) -> tuple[nn.Module, Optimizers]:
        chosen = copy.deepcopy(config)
        chosen.runtime.precision = chosen.runtime.eval_precision = precision.name
        state = build_state(chosen, job.num_classes, RATE, precision, fresh=False)
        apply(choose(chosen, state), chosen, state)
        return state.model, state.optimizer

    with torch.device("meta"):
        size = image_shape(config.data.image_size)
        macs = count_macs(create_model(config.model, image_size=size, num_classes=job.num_classes), size)
    return Entrant(config.model.title + (" checkpointing" if recomputing else ""), build, macs)


def peer_model(job: Job, text: str) -> Entrant:
    """Return the model of a peer with a slash in its name, with fused AdamW."""
    if text.startswith("moa-train/"):
        option = text.removeprefix("moa-train/")
        return replace(our_model(job, job.compose([*job.overrides, f"model={option}"]), False), name=text)

    def build(precision: Precision) -> tuple[nn.Module, Optimizers]:
        model = build_peer(text, job.num_classes).to(precision.device)
        return model, Optimizers([torch.optim.AdamW(model.named_parameters(), RATE, weight_decay=0.05, fused=True)])

    size = image_shape(job.config.data.image_size)
    return Entrant(text, build, count_macs(check_peer(text, job.num_classes, size), size))


def count_macs(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Return the multiply-accumulates of the forward pass for one image; ``model`` is on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, *image_size, device="meta"))
    return int(counter.get_total_flops()) // 2


def _compare(job: Job, entrants: list[Entrant], mode: str, precision: Precision, batch: int) -> Table:
    config, device = job.config, job.device
    layout = torch.channels_last if config.runtime.channels_last else torch.contiguous_format
    size = image_shape(config.data.image_size)
    noise = torch.Generator().manual_seed(config.runtime.seed)
    images = torch.randn(batch, 3, *size, generator=noise).to(device, memory_format=layout)
    targets = torch.rand(batch, job.num_classes, generator=noise).softmax(dim=1).to(device)
    clip = partial(clip_gradients, config=config.optim)

    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, dtype=precision.dtype, device=device)
    measures = {"matrix product": timed(lambda: matrix @ matrix, device, least_seconds=job.seconds)}
    needed, updates = {}, dict[str, list[float]]()
    for entrant in entrants:
        before = memory.allocated(device)
        model, optimizer = entrant.build(precision)
        model = model.to(memory_format=layout).train(mode == "train")
        called = compile_model(model, "blocks") if entrant.compiled else model
        step: Callable[[], object] = partial(plain.predict, called, images, precision)
        if mode == "train":
            inputs = [(images, targets)]
            step = partial(plain.update, called, optimizer, inputs, passes=1, precision=precision, clip=clip)
            step()
            alone = timed(partial(plain.optimize, model, optimizer), device, least_seconds=job.seconds)
            updates[entrant.name] = [alone() for _ in range(3)]
        measures[entrant.name] = timed(step, device, least_seconds=job.seconds)
        if not entrant.compiled or device.type == "cuda":  # on a CPU, memory inside compiled code cannot be tracked
            alive = [model.state_dict(), [part.state for part in optimizer.parts], images, targets]
            needed[entrant.name] = memory.peak(step, device, alive=alive, before=before)

    seconds = alternate(measures, job.rounds)
    reference = Row.rate(f"matrix product of {side}", seconds["matrix product"], 2e-9 * side**3, "GFLOP/s")
    rows = []
    for entrant in entrants:
        taken = seconds[entrant.name]
        achieved = Row.rate("", taken, 2e-9 * entrant.macs * batch * (3 if mode == "train" else 1), "GFLOP/s")
        facts = {"ms": 1e3 * median(taken), "MFU %": 100 * achieved.over(reference).median}
        if entrant.name in updates:
            facts["optimizer %"] = 100 * median(updates[entrant.name]) / median(taken)
        if entrant.name in needed:
            facts["MiB"] = needed[entrant.name] / 2**20
        rows.append(Row.rate(entrant.name, taken, batch, "images/s", GMACs=entrant.macs / 1e9, **facts))
    ratios = [rows[0].over(other) for other in rows[1:]]
    for entrant, ratio in zip(entrants[1:], list(ratios), strict=True):
        more = entrants[0].macs / entrant.macs
        ratios.append(Row(f"{ratio.what}, per MAC", "ratio", [more * value for value in ratio.values]))
    title = f"{mode}, {precision.name}, batch {batch}, {size[0]} x {size[1]}, {job.num_classes} classes"
    return Table("step", title + (f", {config.optim.name}" if mode == "train" else ""), [*rows, reference, *ratios])
