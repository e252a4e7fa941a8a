"""The part of moa-bench that compares numbers of threads next to busy processes."""

import pytest
import torch

from moa_train.bench import load
from moa_train.runtime.errors import UserError


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_every_situation_and_every_change_is_measured(job, monkeypatch):
    for name in ("LEAD", "SETTLE", "TURN"):
        monkeypatch.setattr(load, name, 0.01)
    started = []
    popen = load.subprocess.Popen
    monkeypatch.setattr(load.subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1])
    *situations, changes = load.prepare(job({"runtime.deterministic": "false"}, rounds=2))()
    assert [table.title[-18:] for table in situations] == [f"{busy} busy process(es)" for busy in (0, 1, 2)]
    for table in situations:
        adaptive, *fixed, ratio = table.rows
        assert [row.what for row in (adaptive, *fixed)] == ["adaptive", "1 thread", "2 threads"]
        assert all(len(row.values) == 2 for row in table.rows)  # every situation follows both others
        best = max(fixed, key=lambda row: row.median)
        assert ratio.what == f"adaptive / {best.what}"
        assert ratio.values == [mine / its for mine, its in zip(adaptive.values, best.values, strict=True)]
    pairs = {(before, after) for before in range(3) for after in range(3) if before != after}
    assert {row.what for row in changes.rows} == {f"from {before} to {after} busy" for before, after in pairs}
    assert all(len(row.values) == 1 for row in changes.rows)
    assert len(started) == 4  # 0, 1, 2, 0, 2, 1, 0
    assert all(process.returncode is not None for process in started)


def test_the_number_has_followed_a_change_when_it_stays_good():
    change = load.Change(0, 1, chosen=[(0.5, 2), (1.0, 1), (1.5, 2), (2.0, 1), (9.0, 1)])
    assert change.settled({1}) == 1.5
    assert change.settled({1, 2}) == 0
    assert change.settled({2}) == 9.0


def test_one_thread_leaves_nothing_to_compare(job, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(UserError, match="requires at least two"):
        load.prepare(job())
