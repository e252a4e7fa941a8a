"""Running means that stay on the device, and the speed of the training with the time that is left."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class RunningMeans:
    """Means of named values since the last :meth:`read`, added up on the device without waiting for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one observation of each value: scalar tensors, left on their device, or numbers."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Return the means and start anew. Here the host waits for the device, once for all values."""
        means = {name: total / count for name, (total, count) in self.state_dict().items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Return the sums so far and their counts, so that a resume in between loses none. The host waits here, too."""
        names = [name for name, total in self._sums.items() if isinstance(total, Tensor)]
        totals = {name: total for name, total in self._sums.items() if not isinstance(total, Tensor)}
        if names:
            stacked = torch.stack([torch.as_tensor(self._sums[name]) for name in names])
            totals.update(zip(names, stacked.tolist(), strict=True))
        return {name: (totals[name], self._counts[name]) for name in self._sums}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from what :meth:`state_dict` returned. A sum is a number until the next tensor is added to it."""
        self._sums = {name: float(total) for name, (total, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}


class Speed:
    """Things per second (images, steps), smoothed over the last ``half_life`` seconds or so of work.

    A measurement loses half of its weight in ``half_life`` seconds. Time spent on something else (an
    evaluation, a checkpoint) is left out by calling :meth:`restart` after it.
    """

    def __init__(self, half_life: float = 30.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._half_life = half_life
        self._clock = clock
        self._last: float | None = None
        self._count = 0.0
        self._seconds = 0.0

    def restart(self) -> None:
        """Begin to measure now; what was measured before is kept."""
        self._last = self._clock()

    def tick(self, count: float) -> None:
        """Note that ``count`` things were done since the last tick or restart."""
        now = self._clock()
        if self._last is not None:
            seconds = now - self._last
            memory = 0.5 ** (seconds / self._half_life)
            self._count = self._count * memory + count
            self._seconds = self._seconds * memory + seconds
        self._last = now

    @property
    def rate(self) -> float | None:
        """Things per second; None as long as nothing was measured."""
        return self._count / self._seconds if self._seconds > 0 else None

    def seconds_left(self, remaining: float) -> float | None:
        """Seconds that ``remaining`` things will take, or None as long as nothing was measured."""
        return remaining / self.rate if self.rate else None
