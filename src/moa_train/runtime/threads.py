"""Let the number of threads follow the load of the machine while a training runs.

A parallel loop waits for its slowest thread. If another process uses one of two cores, two threads can be several times
slower than one, and on an idle machine they are 1.6 times as fast. No rule knows which, so `Controller` tries: it
compares the times of real training steps when the load changes, and now and then.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

WARMUP = 2
"""Units of work at the start that are not counted, because they allocate memory."""
TURN = 0.2
"""Shortest time in seconds for which a number of threads is tried without interruption."""
ROUNDS = 2
"""Turns of each number of threads in a trial whose result is not clear."""
CLEAR = 1.3
"""A ratio of times that ends a trial early, and a change of the time of a unit after which a trial is due."""
HYSTERESIS = 1.05
"""A number of threads must be this much faster to replace the current one."""
LOAD_CHANGE = 0.3
"""Change in the number of cores that other processes use, after which a trial is due."""
PAUSE, IDLE_PAUSE = 6.0, 160.0
"""Shortest time in seconds between trials if nothing seems to have changed, next to other processes and without them.

When the first process starts, the load shows it. When others start or end, neither load nor times need to change much.
"""
CONFIRM = 4.0
"""Seconds after a trial that a change caused until the next one, because the change may have disturbed the first."""
LOSS = 0.02
"""Largest share of the time that such trials may lose."""
SETTLE = 2.0
"""Shortest time in seconds between trials."""


@dataclass(frozen=True)
class Unit:
    """A training step or an evaluation batch: its duration in seconds, and its size, such as a number of images."""

    seconds: float
    items: float = 1.0


def mean(units: Sequence[Unit]) -> float:
    """Return the seconds per item."""
    return sum(unit.seconds for unit in units) / sum(unit.items for unit in units)


@dataclass
class Controller:
    """Chooses a number of threads from the times of units of work.

    A trial alternates between the current number of threads, which comes first, and a challenger. It starts at the
    beginning, when the load or the time of a unit changes, and after a pause, which is longer after a costly trial.

    Attributes:
        most: largest number of threads.
        threads: number of threads for the next unit.
        current: the same outside of trials.
    """

    most: int
    threads: int = 0
    current: int = 0
    _count: int = 0
    _recent: deque[Unit] = field(default_factory=lambda: deque(maxlen=256))
    _usual: float | None = None
    """Seconds per item after the last trial."""
    _load: float | None = None
    """Load before the last trial, so that a change during the trial is noticed after it."""
    _ended: float | None = None
    _pause: float = PAUSE
    _by_change: bool = False
    """Whether a change caused the last trial."""
    _lost: float = 0.0
    """Seconds lost in the current trial."""
    _checked: float = -math.inf
    _challengers: list[int] = field(default_factory=list)
    _ours: list[Unit] = field(default_factory=list)
    _theirs: list[Unit] = field(default_factory=list)
    _turn: float = 0.0
    _turns: int = 0

    def __post_init__(self) -> None:
        self.threads = self.current = self.threads or self.most

    def after(self, unit: Unit, now: float, load: float | None = None) -> int:
        """Take a unit of work that ran with ``threads`` threads, and return the number of threads for the next one.

        Args:
            unit: the unit.
            now: the time in seconds, from any start.
            load: number of cores that other processes use, averaged over the last second or so, if it is known.
        """
        self._count += 1
        if self._count > WARMUP and self.most > 1:
            if self._challengers:
                self._compare(unit, now)
            else:
                self._recent.append(unit)
                if self._is_due(now, load):
                    self._load = load
                    self._try(self._candidates(load))
        return self.threads

    def _is_due(self, now: float, load: float | None) -> bool:
        if self._ended is None:
            return True
        waited = now - self._ended
        if waited < SETTLE or now - self._checked < TURN:
            return False
        self._checked = now
        self._usual = self._usual or mean(self._recent)
        self._load = load if self._load is None else self._load
        changed = load is not None and self._load is not None and abs(load - self._load) > LOAD_CHANGE
        latest = self._latest()
        changed |= len(latest) > 1 and not 1 / CLEAR < mean(latest) / self._usual < CLEAR
        idle = load is not None and load < LOAD_CHANGE
        if not changed and waited < (IDLE_PAUSE if idle and not self._by_change else self._pause):
            return False
        self._by_change = changed
        return True

    def _candidates(self, load: float | None) -> list[int]:
        """Return the numbers to try: as many as there are free cores, all, and one (or half) of them."""
        free = self.most if load is None else min(self.most, max(1, round(self.most - load)))
        numbers = (free, self.most, 1 if self.most <= 4 else self.most // 2)
        return [number for number in dict.fromkeys(numbers) if number != self.current]

    def _latest(self) -> list[Unit]:
        """Return the latest units, at least two if there are two, that took about a second together."""
        units, total = [], 0.0
        for unit in reversed(self._recent):
            units.append(unit)
            total += unit.seconds
            if len(units) > 1 and total >= 1.0:
                break
        return units

    def _try(self, challengers: list[int]) -> None:
        self._challengers, self._ours, self._theirs = challengers, [], []
        self.threads, self._turn, self._turns = self.current, 0.0, 0

    def _compare(self, unit: Unit, now: float) -> None:
        is_theirs = self.threads == self._challengers[0]
        (self._theirs if is_theirs else self._ours).append(unit)
        self._turn += unit.seconds
        ratio = mean(self._theirs) / mean(self._ours) if self._theirs else 1.0
        ends = self._turn >= TURN
        if is_theirs and ratio > CLEAR:  # at once, because such units may take long
            self._conclude(False, now)
        elif is_theirs and ends and ratio < 1 / CLEAR:
            self._conclude(True, now)
        elif ends and self._turns == 2 * ROUNDS - 1:
            self._conclude(ratio < 1 / HYSTERESIS, now)
        elif ends:
            self._turn, self._turns = 0.0, self._turns + 1
            self.threads = self.current if is_theirs else self._challengers[0]

    def _conclude(self, challenger_won: bool, now: float) -> None:
        challenger, *others = self._challengers
        if challenger_won:
            self.current, self._ours = challenger, self._theirs
            self._recent.clear()
        else:
            taken, items = sum(unit.seconds for unit in self._theirs), sum(unit.items for unit in self._theirs)
            self._lost += max(0.0, taken - items * mean(self._ours))
        if others:
            self._recent.extend(self._ours)
            self._try(others)
        else:
            self.threads, self._challengers, self._usual, self._ended = self.current, [], None, now
            self._pause, self._lost = CONFIRM if self._by_change else max(PAUSE, self._lost / LOSS), 0.0
            self._recent.clear()


class Load:
    """Measures how many cores other processes use, from /proc/stat."""

    def __init__(self, stat: Path = Path("/proc/stat"), cores: frozenset[int] | None = None) -> None:
        if cores is None and hasattr(os, "sched_getaffinity"):
            cores = frozenset(os.sched_getaffinity(0))
        self.stat, self.cores = stat, cores or frozenset()
        self._samples: deque[tuple[float, float, float]] = deque()

    def __call__(self, now: float | None = None, own: float | None = None) -> float | None:
        """Return the mean number of cores that other processes used for about the last second, or None if unknown.

        Args:
            now: the time, and
            own: the CPU time of this process so far, in seconds; both are for tests.
        """
        now, own = now if now is not None else time.perf_counter(), own if own is not None else time.process_time()
        if self._samples and now - self._samples[-1][0] < 0.2:
            return self._value()
        try:
            lines = [line.split() for line in self.stat.read_text().splitlines() if line.startswith("cpu")]
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        # user, nice, system, idle, iowait, irq, softirq, steal
        busy = sum(
            sum(int(field) for place, field in enumerate(line[1:9]) if place not in (3, 4)) / ticks
            for line in lines
            if line[0][3:].isdigit() and int(line[0][3:]) in self.cores
        )
        self._samples.append((now, busy, own))
        while len(self._samples) > 2 and now - self._samples[1][0] >= 1.0:
            self._samples.popleft()
        return self._value()

    def _value(self) -> float | None:
        (start, busy_before, own_before), (end, busy, own) = self._samples[0], self._samples[-1]
        if end - start < 0.5:
            return None
        return max(0.0, (busy - busy_before - own + own_before) / (end - start))


class AdaptiveThreads:
    """Sets the number of threads of this process by a `Controller` for each kind of work.

    Args:
        most: largest number of threads.
        adapt: whether the number may change.
        agree: returns the number that all ranks use in training, given this rank's.
    """

    def __init__(self, most: int = 1, adapt: bool = True, agree: Callable[[int], int] | None = None) -> None:
        self.most, self.adapts, self._agree = most, adapt and most > 1, agree
        self.say: Callable[[str], None] = lambda text: None
        self._controllers: dict[str, Controller] = {}
        self._used: dict[str, int] = {}
        self._kind = "train"
        self._last: float | None = None
        self._load = Load()

    @property
    def counts(self) -> dict[str, int]:
        """The chosen number of threads by kind of work, which differs from the number in use during a trial."""
        return {kind: controller.current for kind, controller in self._controllers.items()}

    def restart(self) -> None:
        """Start the next unit now, after something else was done."""
        self._last = time.perf_counter()

    def pin(self, threads: int | None) -> None:
        """Use a fixed number of threads for a while, or, if it is None, the adaptive number again."""
        self.adapts = threads is None
        torch.set_num_threads(threads or self._used.get(self._kind, self.most))
        self.restart()

    def tick(self, items: float) -> None:
        """Note that a unit of work of ``items`` items is complete."""
        if not self.adapts:
            return
        now = time.perf_counter()
        if self._last is not None:
            controller = self._controller()
            before = controller.current
            controller.after(Unit(now - self._last, items), now, self._load(now))
            self._set(controller.threads)
            if controller.current != before and self._kind == "train":
                self.say(f"Training uses {controller.current} instead of {before} threads: it is faster at this load.")
        self._last = time.perf_counter()

    @contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Count the units of the context as another kind of work, with its own number of threads."""
        before, self._kind = self._kind, kind
        if self.adapts:
            self._set(self._controller().threads)
        self.restart()
        try:
            yield
        finally:
            self._kind = before
            if self.adapts:
                torch.set_num_threads(self._used.get(before, self.most))
            self.restart()

    def _controller(self) -> Controller:
        if self._kind not in self._controllers:
            known = next(iter(self._controllers.values()), None)
            self._controllers[self._kind] = Controller(self.most, known.threads if known else self.most)
        return self._controllers[self._kind]

    def _set(self, threads: int) -> None:
        if self._agree is not None and self._kind == "train":
            threads = self._agree(threads)
        self._used[self._kind] = threads
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
