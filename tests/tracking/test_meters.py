import json
import math

import pytest
import torch

from moa_train.tracking.meters import HALF_LIFE, RunningMeans, Speed


def test_means_since_the_last_read() -> None:
    means = RunningMeans()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value, requires_grad=True) * 1, "lr": value / 2})
    means.add({"loss": torch.tensor(3.0)})  # lr is not observed this time
    assert means.read() == {"loss": 3.0, "lr": 1.5}
    assert means.read() == {}
    means.add({"loss": torch.tensor(5.0)})
    assert means.read() == {"loss": 5.0}


def test_nan_is_not_hidden() -> None:
    means = RunningMeans()
    for value in (1.0, math.nan, 2.0):
        means.add({"loss": torch.tensor(value)})
    assert math.isnan(means.read()["loss"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saving_and_loading_in_between_changes_no_bit(dtype: torch.dtype) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype)
    straight, resumed = RunningMeans(), RunningMeans()
    for number, value in enumerate(values):
        straight.add({"loss": value, "lr": number / 7})
        resumed.add({"loss": value, "lr": number / 7})
        if number % 13 == 0:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = RunningMeans()
            resumed.load_state_dict(state)
    assert straight.read() == resumed.read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adding_does_not_wait_for_the_device() -> None:
    means, loss = RunningMeans(), torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            means.add({"loss": loss, "lr": 1.0})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert means.read() == {"loss": 1.0, "lr": 1.0}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steady_speed() -> None:
    clock = Clock()
    speed = Speed(clock=clock)
    assert (speed.rate, speed.seconds_left(5)) == (None, None)
    speed.restart()
    for _ in range(50):
        clock.now += 0.5
        speed.tick(64)
    assert speed.rate == pytest.approx(128)
    assert speed.seconds_left(1280) == pytest.approx(10)


def test_a_new_speed_has_half_the_weight_after_one_half_life() -> None:
    clock = Clock()
    speed = Speed(clock=clock)
    speed.restart()
    for seconds, count in ((1000, 100), (HALF_LIFE, 200)):  # 100 per second for long, then 200
        for _ in range(int(seconds * 10)):
            clock.now += 0.1
            speed.tick(count / 10)
    assert speed.rate == pytest.approx(150, rel=0.01)


def test_pauses_do_not_count() -> None:
    clock = Clock()
    speed = Speed(clock=clock)
    speed.restart()
    clock.now += 1
    speed.tick(100)
    clock.now += 500  # an evaluation
    speed.restart()
    clock.now += 1
    speed.tick(100)
    assert speed.rate == pytest.approx(100)


def test_the_first_tick_only_starts_the_clock() -> None:
    """The first step includes compilation and warmup, which would distort the estimate."""
    clock = Clock()
    speed = Speed(clock=clock)
    clock.now += 60
    speed.tick(1)
    assert speed.rate is None
    clock.now += 1
    speed.tick(1)
    assert speed.rate == pytest.approx(1)
