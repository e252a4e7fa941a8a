"""Choose what is fastest on this machine, by a short measurement at the start of a run.

A choice that the user has made is not measured. `measure.py` takes the times, and `decide` is a function from times to
choices.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moa_train.assembly.measure import Times, fastest, measure
from moa_train.data.source import Source
from moa_train.engine.state import TrainState
from moa_train.model.attention import BiasedAttention
from moa_train.model.layers import DropPath
from moa_train.optim.muon import BatchedMuon
from moa_train.runtime.precision import Precision, has_bf16
from moa_train.schema import RunConfig

DEFAULTS = {
    "runtime.precision": "auto",
    "optim.muon_precision": "auto",
    "runtime.attention": "auto",
    "runtime.eval_attention": "auto",
    "runtime.stochastic_depth": "auto",
    "engine.eval_batch_size": None,
    "data.workers": None,
}
"""The settings that may be chosen by measurement, with the value that leaves the choice to it."""
KEPT = tuple(key for key in DEFAULTS if key not in ("engine.eval_batch_size", "data.workers"))
"""Choices that a resume keeps, because the numbers of a training depend on them."""


@dataclass(frozen=True)
class Choices:
    """What was chosen.

    Attributes:
        device: kind of device on which it was measured.
        values: choices by setting.
        gains: how many times as fast each is as the slowest other candidate; 1 for the only candidate.
        seconds: CPU time of the measurement.
    """

    device: str = "cpu"
    values: dict[str, Any] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the choices as JSON."""
        return {"device": self.device, "values": self.values, "gains": self.gains, "seconds": round(self.seconds, 3)}

    def describe(self) -> str:
        """Return one line: what was chosen, and how many times as fast it is as the alternative."""
        texts = [
            f"{key.rpartition('.')[2]}={value} ({self.gains[key]:.3g}x)" if key in self.gains else f"{key}={value}"
            for key, value in self.values.items()
        ]
        return f"{', '.join(texts)}; measured in {self.seconds:.2f} s of CPU time" if texts else ""


def decide(times: Mapping[str, Times]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the choice and its gain for each setting, given the seconds of its candidates."""
    values: dict[str, Any] = {}
    gains: dict[str, float] = {}
    for key, seconds in times.items():
        best = fastest(seconds)
        values[key] = best if key in KEPT else int(best)
        gains[key] = round(max(seconds.values()) / seconds[best], 2)
    return values, gains


def choose(
    config: RunConfig,
    state: TrainState,
    source: Source | None = None,
    recorded: Mapping[str, Any] | None = None,
    local_world_size: int = 1,
) -> Choices:
    """Measure what the configuration leaves open, and return the choices.

    Args:
        config: the configuration. With ``runtime.deterministic``, nothing is measured.
        state: model and optimizer, whose shapes are measured on copies.
        source: training images; those in files need workers.
        recorded: choices of an earlier start, as `Choices.as_dict` returns them, which a resume on the same kind of
            device keeps where numbers depend on them.
        local_world_size: ranks that share the cores of this machine.
    """
    device = state.precision.device
    if config.runtime.deterministic:
        return Choices(device.type)
    resumed = recorded is not None and recorded["device"] == device.type
    kept = dict(recorded["values"]) if recorded and resumed else {}
    kept = {key: value for key, value in kept.items() if key in KEPT and is_open(config, key)}
    # What was not measured at the first start, such as on a slow machine, was left to rules, and stays so.
    wanted = [key for key in DEFAULTS if is_open(config, key) and not (resumed and key in KEPT)]
    started = time.process_time()
    # With several threads, the CPU time would include waiting for each other, which depends on other processes.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            times = measure(config, state, wanted, kept, source, local_world_size)
    finally:
        torch.set_num_threads(threads)
    values, gains = decide(times)
    return Choices(device.type, {**kept, **values}, gains, time.process_time() - started)


def is_open(config: RunConfig, key: str) -> bool:
    """Return whether the user has left a setting to the measurement."""
    section, _, name = key.partition(".")
    return bool(getattr(getattr(config, section), name) == DEFAULTS[key])


def apply(choices: Choices, config: RunConfig, state: TrainState) -> RunConfig:
    """Apply the choices to model and optimizer, and return the configuration with the choices filled in."""
    config = copy.deepcopy(config)
    for key, value in choices.values.items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)
    precision = Precision.resolve(config.runtime.precision, state.precision.device)
    if precision.name != state.precision.name:  # otherwise its loss scale may be restored already
        state.precision = precision
    set_kernels(state.model, config)
    device = state.precision.device
    fixed = torch.bfloat16 if device.type in ("cpu", "cuda") or has_bf16(device) else torch.float32
    dtypes = {"auto": fixed, "bf16": torch.bfloat16, "fp32": torch.float32}
    for optimizer in state.optimizer.parts:
        if isinstance(optimizer, BatchedMuon):
            optimizer.dtype = dtypes[config.optim.muon_precision]
    return config


def set_kernels(model: nn.Module, config: RunConfig) -> None:
    """Set the attention kernels and the form of stochastic depth in all layers of a model."""
    runtime = config.runtime
    for module in model.modules():
        if isinstance(module, BiasedAttention):
            module.kernel, module.eval_kernel = runtime.attention, runtime.eval_attention
        elif isinstance(module, DropPath):
            module.method = runtime.stochastic_depth
