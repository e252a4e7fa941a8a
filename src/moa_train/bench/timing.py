"""Time candidates alternately (A B A B), so that both times of a ratio reflect the same state of the machine."""

import math
import time
from collections.abc import Callable, Mapping

import torch

Measure = Callable[[], float]
"""A function that measures once and returns seconds."""


def alternate(measures: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Run every measurement once per round, alternately, and return the results by name, one per round."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            taken[name].append(measure())
    return taken


def timed(
    function: Callable[[], object], device: torch.device, *, least_seconds: float = 0.5, warmup: int = 2
) -> Measure:
    """Warm up ``function`` immediately, and return a function that measures the seconds per call.

    Each measurement is the mean over consecutive calls that together take about ``least_seconds``, because a single
    call can be shorter than the noise. On CUDA, device events measure the time after all queued work has finished.
    """
    for _ in range(warmup):
        function()
    seconds = _elapsed(function, 1, device)
    calls = max(1, math.ceil(least_seconds / max(seconds, 1e-9)))
    return lambda: _elapsed(function, calls, device) / calls


def _elapsed(function: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
