"""Interleaved timing, and statistics compared with NumPy."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_train.bench import tables, timing
from moa_train.bench.tables import Row, Table

CPU = torch.device("cpu")
VALUES = np.random.default_rng(0).uniform(0.1, 5.0, (2, 7))


def test_candidates_alternate():
    order: list[str] = []
    ticks = iter(range(100))

    def measure(name: str) -> timing.Measure:
        return lambda: order.append(name) or float(next(ticks))

    taken = timing.alternate({name: measure(name) for name in "AB"}, rounds=3)
    assert order == list("ABABAB")
    assert taken == {"A": [0, 2, 4], "B": [1, 3, 5]}


@pytest.mark.parametrize(("least", "repeats"), [(0.0, 1), (0.05, 52)])
def test_a_short_function_is_repeated_until_its_time_can_be_measured(least, repeats, monkeypatch):
    calls = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: len(calls) / 1024)  # a call takes 1/1024 s

    def work() -> None:
        calls.append(None)

    measure = timing.timed(work, CPU, least_seconds=least, warmup=2)
    before = len(calls)
    assert before == 3  # two warmup calls, and one call to estimate the time
    assert measure() == 1 / 1024
    assert len(calls) - before == repeats


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_time_is_measured_on_the_device():
    matrix = torch.randn(4096, 4096, device="cuda")
    measure = timing.timed(lambda: matrix @ matrix, torch.device("cuda"), least_seconds=0.01)
    started = time.perf_counter()
    assert 0 < measure() < time.perf_counter() - started


def test_statistics_equal_those_of_numpy():
    row = Row("x", "ms", VALUES[0].tolist())
    result = row.as_dict()
    assert result["n"] == 7
    assert [result[name] for name in ("median", "min", "max")] == pytest.approx(
        [np.median(VALUES[0]), VALUES[0].min(), VALUES[0].max()], rel=1e-15
    )


def test_ratios_are_computed_round_by_round():
    a, b = (Row.rate(name, seconds.tolist(), 32, ms=1.0) for name, seconds in zip("ab", VALUES, strict=True))
    assert a.values == pytest.approx((32 / VALUES[0]).tolist())
    ratio = a.over(b)
    assert (ratio.what, ratio.unit) == ("a / b", "ratio")
    assert ratio.median == pytest.approx(np.median(VALUES[1] / VALUES[0]))


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123456, "0.01235"), (1.0, "1.000"), (123.45, "123.5"), (1234.5, "1,234"), (0.0, "0.000")]
)
def test_numbers_have_four_digits(value, text):
    assert tables.number(value) == text


def test_tables_are_aligned():
    rows = [Row("first", "images/s", [1.0, 3.0, 2.0], {"MFU %": 41.5}), Row("second, longer", "ms", [1500.0])]
    title, head, first, second = Table("step", "train, bf16", rows).text().splitlines()
    assert title == "step: train, bf16"
    assert head.split() == ["median", "min", "max", "n", "MFU", "%"]
    assert first.split() == ["first", "images/s", "2.000", "1.000", "3.000", "3", "41.50"]
    assert second.split() == ["second,", "longer", "ms", "1,500", "1,500", "1,500", "1"]
    assert head.index("median") + len("median") == first.index("2.000") + len("2.000")


def test_json_contains_hardware_versions_and_values(tmp_path: Path):
    head = tables.header(CPU, ["moa-bench", "step"])
    tables.write(tmp_path / "new" / "x.json", head, [Table("step", "t", [Row("x", "ms", [2.0, 1.0])])])
    result = json.loads((tmp_path / "new" / "x.json").read_text())
    assert torch.__version__.startswith(result["versions"]["torch"])
    assert result["threads"] == torch.get_num_threads()
    assert result["command"] == ["moa-bench", "step"]
    assert result["tables"][0]["rows"][0] == {
        "what": "x", "unit": "ms", "median": 1.5, "min": 1.0, "max": 2.0, "n": 2, "values": [2.0, 1.0],
    }  # fmt: skip
    assert result["versions"]["torch"] in tables.describe(head)
