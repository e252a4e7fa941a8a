"""Timing by turns: A B A B. A ratio of two times of one round is a ratio in one state of the machine."""

import math
import time
from collections.abc import Callable, Mapping

import torch

Measure = Callable[[], float]
"""Takes one time, in seconds."""


def alternate(measures: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Take every measure once in each round, in turn; return the results by name, in order of rounds."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            taken[name].append(measure())
    return taken


def timed(
    function: Callable[[], object], device: torch.device, *, least_seconds: float = 0.5, warmup: int = 2
) -> Measure:
    """Warm ``function`` up, here and now, and return the measure of one call of it.

    The measure is the mean of as many calls in a row as take about ``least_seconds``: a call alone may be shorter than
    what disturbs it. On CUDA the device's own clock is read (events), after all that was queued before.
    """
    for _ in range(warmup):
        function()
    seconds = _elapsed(function, 1, device)
    calls = max(1, math.ceil(least_seconds / max(seconds, 1e-9)))
    return lambda: _elapsed(function, calls, device) / calls


def _elapsed(function: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
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
    """Wait until ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
