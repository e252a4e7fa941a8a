"""Running means that stay on the device, and the speed of the training with the remaining time."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

HALF_LIFE = 30.0
"""Seconds after which a measurement of the speed has half its weight."""


class RunningMeans:
    """Average named values since the last `read`. Sums stay on the device, so adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one observation of each value, a number or a scalar tensor on any device."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Return the means and reset them. The host waits for the device once."""
        means = {name: total / count for name, (total, count) in self.state_dict().items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Return the current sums and counts for a checkpoint. The host waits for the device once."""
        names = [name for name, total in self._sums.items() if isinstance(total, Tensor)]
        totals = {name: total for name, total in self._sums.items() if not isinstance(total, Tensor)}
        if names:
            stacked = torch.stack([torch.as_tensor(self._sums[name]) for name in names])
            totals.update(zip(names, stacked.tolist(), strict=True))
        return {name: (totals[name], self._counts[name]) for name in self._sums}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from the sums and counts that `state_dict` returned."""
        self._sums = {name: float(total) for name, (total, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}


class Speed:
    """Measure items (images, steps) per second, averaged with weights that halve every `HALF_LIFE` seconds.

    To exclude time spent on something else, such as an evaluation or a checkpoint, call `restart` after it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: float | None = None
        self._count = 0.0
        self._seconds = 0.0

    def restart(self) -> None:
        """Start the next measurement now. Earlier measurements are kept."""
        self._last = self._clock()

    def tick(self, count: float) -> None:
        """Note that ``count`` items were processed since the last tick or restart."""
        now = self._clock()
        if self._last is not None:
            seconds = now - self._last
            decay = 0.5 ** (seconds / HALF_LIFE)
            self._count = self._count * decay + count
            self._seconds = self._seconds * decay + seconds
        self._last = now

    @property
    def rate(self) -> float | None:
        """Items per second, or None before the first measurement."""
        return self._count / self._seconds if self._seconds > 0 else None

    def seconds_left(self, remaining: float) -> float | None:
        """Return the seconds that ``remaining`` items will take, or None before the first measurement."""
        return remaining / self.rate if self.rate else None
