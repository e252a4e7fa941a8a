"""The controller of threads, on a simulated machine; and the load, from recorded contents of /proc/stat."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from moa_train.runtime.threads import AdaptiveThreads, Controller, Load, Unit

IDLE = ({1: 0.4, 2: 0.25}, 0.0)
ONE_BUSY = ({1: 0.4, 2: 1.1}, 0.95)
TWO_BUSY = ({1: 0.6, 2: 0.9}, 1.3)
"""Seconds of a step by number of threads, and the cores that other processes use, as measured on two cores."""
LONG = [({1: 0.24, 2: 0.17}, 0.0), ({1: 0.24, 2: 0.32}, 1.0), ({1: 0.38, 2: 0.33}, 1.2)]
"""The same of a larger model. With two threads, neither time nor load shows that one of two processes has ended."""


class Machine:
    """A machine on which a training runs: it counts images per second of simulated time."""

    def __init__(self, controller: Controller, *, knows_load: bool = True, jitter: float = 0.1) -> None:
        self.controller, self.knows_load, self.now = controller, knows_load, 100.0
        generator = random.Random(0)
        self.noise = (generator.random() * jitter for _ in itertools.count())
        self.used: list[int] = []

    def run(self, situation: tuple[dict[int, float], float], seconds: float, scale: float = 1.0) -> float:
        """Train for some seconds, and return the speed relative to that of the best fixed number of threads."""
        times, load = situation
        end, start, done = self.now + seconds, self.now, 0
        while self.now < end:
            taken = scale * times[self.controller.threads] * (1 + next(self.noise))
            self.used.append(self.controller.threads)
            self.now += taken
            self.controller.after(Unit(taken, 64), self.now, load if self.knows_load else None)
            done += 1
        return done / (self.now - start) * scale * min(times.values()) * 1.05


@pytest.mark.parametrize("situation", [IDLE, ONE_BUSY, TWO_BUSY])
@pytest.mark.parametrize("scale", [0.05, 1.0])
@pytest.mark.parametrize("knows_load", [True, False])
def test_the_speed_is_at_least_nine_tenths_of_the_best_fixed_number(situation, scale, knows_load):
    machine = Machine(Controller(2), knows_load=knows_load)
    machine.run(situation, 5, scale)
    assert machine.run(situation, 120, scale) >= 0.9
    best = min(situation[0], key=situation[0].__getitem__)
    assert machine.controller.current == best


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(range(3), 2)))
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("situations", [[IDLE, ONE_BUSY, TWO_BUSY], LONG])
def test_a_change_is_answered_within_ten_seconds(situations, before, after, scale):
    for lead in range(60, 70):  # the change comes between trials or during one
        machine = Machine(Controller(2))
        machine.run(situations[before], lead, scale)
        machine.run(situations[after], 10, scale)
        assert machine.run(situations[after], 20, scale) >= 0.9


def test_a_change_is_followed_by_a_second_trial():
    """The change may have disturbed the first one."""
    machine = Machine(Controller(2))
    machine.run(IDLE, 60, 0.1)
    before = len(machine.used)
    machine.run(ONE_BUSY, 5.5, 0.1)
    used = machine.used[before:]
    assert (1, 2) in itertools.pairwise(used[used.index(1) :])


def test_trials_of_a_much_slower_number_are_rare():
    machine = Machine(Controller(2))
    machine.run(({1: 0.1, 2: 1.5}, 1.0), 5)
    assert machine.run(({1: 0.1, 2: 1.5}, 1.0), 600) >= 0.97
    assert machine.used.count(2) >= 5


def test_without_a_known_load_a_slowdown_starts_a_trial():
    machine = Machine(Controller(2), knows_load=False)
    machine.run(IDLE, 60, 0.2)
    machine.run(ONE_BUSY, 10, 0.2)
    assert machine.run(ONE_BUSY, 20, 0.2) >= 0.9


def test_trials_become_rare_while_nothing_changes():
    machine = Machine(Controller(2))
    machine.run(IDLE, 600, 0.2)
    assert machine.used.count(1) < 0.01 * len(machine.used)


def test_one_busy_process_of_eight_cores_leaves_seven_threads():
    times = {threads: (4.0 / threads if threads <= 7 else 0.9) for threads in range(1, 9)}
    machine = Machine(Controller(8))
    machine.run((times, 1.0), 20, 0.2)
    assert machine.controller.current == 7


def test_a_single_core_is_never_tried():
    machine = Machine(Controller(1))
    machine.run(({1: 0.1}, 0.0), 30)
    assert set(machine.used) == {1}


def stat(user0: int, user1: int) -> str:
    """Return the content of /proc/stat; the second core also has 0.09 s of waiting and 0.03 s stolen by the host."""
    rows = [("cpu ", user0 + user1, 0, 0), ("cpu0", user0, 0, 0), ("cpu1", user1, 9, 3)]
    return "".join(f"{name} {user} 0 0 500 {wait} 0 0 {stolen} 0 0\n" for name, user, wait, stolen in rows)


def test_load_is_what_other_processes_use_on_the_cores_of_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    path = tmp_path / "stat"
    load = Load(path, frozenset({0, 1}))
    path.write_text(stat(0, 0))
    assert load(now=0.0, own=5.0) is None
    path.write_text(stat(100, 80))
    assert load(now=1.0, own=5.8) == pytest.approx(1.0)  # 1.8 seconds of CPU time, of which 0.8 are ours
    only_first = Load(path, frozenset({0}))
    path.write_text(stat(0, 0))
    only_first(now=0.0, own=0.0)
    path.write_text(stat(100, 80))
    assert only_first(now=1.0, own=0.25) == pytest.approx(0.75)


def test_load_is_unknown_without_proc(tmp_path):
    assert Load(tmp_path / "missing")(now=1.0, own=1.0) is None


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_evaluation_has_its_own_number_and_training_gets_its_back():
    torch.set_num_threads(1)
    threads = AdaptiveThreads(2)
    threads.restart()
    threads.tick(1)
    assert torch.get_num_threads() == threads.counts["train"] == 2
    with threads.doing("evaluation"):
        threads._controllers["evaluation"].threads = 1
        threads._set(1)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("most", "adapt"), [(2, False), (1, True)])
def test_a_fixed_number_is_never_changed(most, adapt):
    torch.set_num_threads(1)
    threads = AdaptiveThreads(most, adapt)
    threads.restart()
    for _ in range(5):
        threads.tick(1)
    with threads.doing("evaluation"):
        threads.tick(1)
    assert torch.get_num_threads() == 1


def agreed(choices: list[int]) -> Callable[[int], int]:
    return lambda threads: choices.append(threads) or 1


@pytest.mark.usefixtures("_threads")
def test_ranks_use_the_number_that_they_agree_on():
    asked: list[int] = []
    threads = AdaptiveThreads(2, agree=agreed(asked))
    threads.restart()
    threads.tick(1)
    assert asked == [2]
    assert torch.get_num_threads() == 1
