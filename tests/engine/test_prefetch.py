"""Batches that are copied to the device ahead: the same ones, in the same order."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moa_train.engine.prefetch import Prefetcher
from moa_train.interfaces import Batch
from moa_train.runtime.signals import StopRequestedError

CUDA: Any = SimpleNamespace(type="cuda")


def batch(step: int) -> Batch:
    numbers = torch.full((2,), step)
    return Batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), numbers, numbers, numbers, numbers, step)


def test_nothing_is_read_ahead_on_a_cpu() -> None:
    batches = iter([batch(step) for step in range(3)])
    prefetcher = Prefetcher(batches, torch.device("cpu"))
    assert next(prefetcher).step == 0
    prefetcher.ahead()
    assert next(batches).step == 1  # not taken by the prefetcher
    assert next(prefetcher).step == 2
    with pytest.raises(StopIteration):
        next(prefetcher)


@dataclass
class Copied:
    """A batch on a device that does not exist; its tensors record which streams use their memory."""

    step: int
    streams: list[str] = field(default_factory=list)

    def to(self, device: Any, non_blocking: bool) -> "Copied":
        assert non_blocking
        EVENTS.append(f"copy {self.step} on {STREAMS[-1]}")
        return self

    @property
    def images(self) -> Any:
        return SimpleNamespace(record_stream=lambda stream: self.streams.append(stream.name))

    labels = images


EVENTS: list[str] = []
STREAMS = ["compute"]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the streams of CUDA, which record what happens on them."""

    @contextmanager
    def switch(stream: Any) -> Any:
        STREAMS.append(stream.name)
        yield
        STREAMS.pop()

    def create(name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: EVENTS.append(f"{name} waits for {other.name}"))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: create("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: create(STREAMS[-1]))
    monkeypatch.setattr(torch.cuda, "stream", switch)
    EVENTS.clear()


@pytest.mark.usefixtures("streams")
def test_a_copy_starts_one_batch_ahead_and_is_awaited_by_its_own_step() -> None:
    prefetcher: Any = Prefetcher(iter([Copied(step) for step in range(3)]), CUDA)  # type: ignore[arg-type]
    used = []
    for step in range(3):
        used.append(next(prefetcher))
        EVENTS.append(f"step {step}")
        prefetcher.ahead()
        prefetcher.ahead()  # no second batch
    assert [found.step for found in used] == [0, 1, 2]
    assert [found.streams for found in used] == 3 * [["compute", "compute"]]
    wait = "compute waits for copies"
    assert [
        *("copy 0 on copies", wait, "step 0"),
        *("copy 1 on copies", wait, "step 1"),
        *("copy 2 on copies", wait, "step 2"),
    ] == EVENTS
    with pytest.raises(StopIteration):
        next(prefetcher)


@pytest.mark.usefixtures("streams")
def test_an_error_ahead_is_raised_by_the_step_that_needs_the_batch() -> None:
    def batches() -> Any:
        yield Copied(0)
        raise StopRequestedError("asked to stop")

    prefetcher: Any = Prefetcher(batches(), CUDA)
    assert next(prefetcher).step == 0
    prefetcher.ahead()
    with pytest.raises(StopRequestedError, match="asked to stop"):
        next(prefetcher)
