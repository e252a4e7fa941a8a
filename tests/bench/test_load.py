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
def test_every_situation_has_a_table_with_all_numbers_and_the_ratio_to_the_best(job, monkeypatch):
    monkeypatch.setattr(load, "SETTLE", 0.0)
    monkeypatch.setattr(load, "TURN", 0.01)
    started = []
    popen = load.subprocess.Popen
    monkeypatch.setattr(load.subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1])
    work = job({"runtime.deterministic": "false"}, rounds=2)
    tables = list(load.prepare(work)())
    assert [table.title[-18:] for table in tables] == [f"{busy} busy process(es)" for busy in (0, 1, 2)]
    assert len(started) == 3
    assert all(process.returncode is not None for process in started)
    for table in tables:
        adaptive, *fixed, ratio = table.rows
        assert [row.what for row in (adaptive, *fixed)] == ["adaptive", "1 thread", "2 threads"]
        best = max(fixed, key=lambda row: row.median)
        assert ratio.what == f"adaptive / {best.what}"
        assert ratio.values == [mine / its for mine, its in zip(adaptive.values, best.values, strict=True)]


def test_one_thread_leaves_nothing_to_compare(job, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(UserError, match="requires at least two"):
        load.prepare(job())
