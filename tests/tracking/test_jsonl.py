import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moa_train.tracking.jsonl import JsonLines, read_rows


def write(path: Path, steps: range, first_step: int = 0) -> None:
    writer = JsonLines(path, first_step)
    for step in steps:
        writer.log_step(step, {"loss": 1 / (step + 1), "rate": 1e-3})
    writer.close()


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    writer.log_step(3, {"loss": 0.1 + 0.2, "rate": 1e-3})
    writer.log_eval(3, {"top1": 50.0, "best": True}, "val")
    text = path.read_text()  # before it is closed
    assert [json.loads(line) for line in text.splitlines()] == [
        {"kind": "train", "step": 3, "loss": 0.1 + 0.2, "rate": 1e-3},
        {"kind": "eval", "step": 3, "split": "val", "top1": 50.0, "best": True},
    ]
    writer.close()
    assert read_rows(path) == [json.loads(line) for line in text.splitlines()]


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    writer.log_step(1, {"loss": math.nan, "grad_norm": math.inf, "rate": -math.inf, "epoch": 1.0})
    writer.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"kind": "train", "step": 1, "loss": None, "grad_norm": None, "rate": None, "epoch": 1.0}


def test_a_resume_writes_no_step_twice(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    write(straight, range(20))
    write(resumed, range(13))
    write(resumed, range(8, 17), first_step=8)
    write(resumed, range(17, 20), first_step=17)
    assert resumed.read_bytes() == straight.read_bytes()
    write(resumed, range(20), first_step=0)
    assert resumed.read_bytes() == straight.read_bytes()
    assert list(tmp_path.glob("*partial*")) == []


@pytest.mark.parametrize("size", [1, 10, 40])
def test_a_half_written_line_is_dropped(tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    straight, cut = tmp_path / "straight.jsonl", tmp_path / "cut.jsonl"
    write(straight, range(10))
    write(cut, range(5))
    with cut.open("ab") as file:
        file.write(straight.read_bytes().splitlines()[5][:size])
    assert [row["step"] for row in read_rows(cut)] == [0, 1, 2, 3, 4]
    write(cut, range(5, 10), first_step=5)
    assert cut.read_bytes() == straight.read_bytes()
    assert caplog.records == []


@pytest.mark.parametrize("damage", [b"\x00\xff\xfe", b"[1, 2]", b'{"step": "three"}', b"", b"{}", b'{"step": 1'])
def test_a_damaged_line_is_left_out_and_named(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    lines = path.read_bytes().splitlines()
    lines[2] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in read_rows(path)] == [0, 1, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: line 3 is damaged and left out."]


def test_a_left_over_of_a_kill_while_it_was_rewound(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    (tmp_path / "metrics.jsonl.partial").write_text('{"kind": "train", "st')
    write(path, range(3, 5), first_step=3)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
    assert not (tmp_path / "metrics.jsonl.partial").exists()


KILLED = """
import sys
from pathlib import Path
from moa_train.tracking.jsonl import JsonLines
path, first = Path(sys.argv[1]), int(sys.argv[2])
writer = JsonLines(path, first)
for step in range(first, 10**9):
    writer.log_step(step, {"loss": step / 7, "text": "x" * 5000})
"""


def test_sigkill_while_writing(tmp_path: Path) -> None:
    """Killed twice at some moment: what is there is whole, in order, and without gaps."""
    path, first = tmp_path / "metrics.jsonl", 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(first)])
        deadline = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < 30_000 * (first + 1)) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        steps = [row["step"] for row in read_rows(path)]
        assert steps == list(range(len(steps)))
        assert len(steps) > first
        first = len(steps) // 2
