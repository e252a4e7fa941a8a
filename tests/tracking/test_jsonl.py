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
    logger = JsonLines(path, first_step)
    for step in steps:
        logger.log_step(step, {"loss": 1 / (step + 1), "lr": 1e-3})
    logger.close()


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonLines(path)
    logger.log_step(3, {"loss": 0.1 + 0.2, "lr": 1e-3})
    logger.log_eval(3, {"top1": 50.0, "best": True}, "val")
    text = path.read_text()  # while it is open
    assert [json.loads(line) for line in text.splitlines()] == [
        {"kind": "train", "step": 3, "loss": 0.1 + 0.2, "lr": 1e-3},
        {"kind": "eval", "step": 3, "split": "val", "top1": 50.0, "best": True},
    ]
    logger.close()
    assert read_rows(path) == [json.loads(line) for line in text.splitlines()]


def test_numbers_that_json_cannot_express(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonLines(path)
    logger.log_step(1, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "epoch": 1.0})
    logger.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"kind": "train", "step": 1, "loss": None, "grad_norm": None, "lr": None, "epoch": 1.0}


def test_a_resume_writes_no_step_twice(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    write(straight, range(20))
    write(resumed, range(13))
    write(resumed, range(8, 17), first_step=8)
    write(resumed, range(17, 20), first_step=17)
    assert resumed.read_bytes() == straight.read_bytes()
    write(resumed, range(20), first_step=0)
    assert resumed.read_bytes() == straight.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.jsonl", "straight.jsonl"]


@pytest.mark.parametrize("size", [1, 10, 40])
def test_a_partial_line_is_dropped(tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
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
def test_a_damaged_line_is_skipped_and_reported(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    lines = path.read_bytes().splitlines()
    lines[2] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in read_rows(path)] == [0, 1, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: line 3 is damaged. It is skipped."]


def test_rows_of_older_versions_with_the_former_name_of_lr(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 2.0, "rate": 0.1, "memory": 3}\n')
    expected = {"kind": "train", "step": 1, "loss": 2.0, "lr": 0.1, "memory": 3}
    assert read_rows(path) == [expected]
    JsonLines(path, first_step=2).close()
    assert json.loads(path.read_text()) == expected


KILLED = """
import sys
from pathlib import Path
from moa_train.tracking.jsonl import JsonLines
path, first = Path(sys.argv[1]), int(sys.argv[2])
logger = JsonLines(path, first)
for step in range(first, 10**9):
    logger.log_step(step, {"loss": step / 7, "text": "x" * 5000})
"""


def test_sigkill_while_writing(tmp_path: Path) -> None:
    """After each of two kills at a random moment, the rows are complete, in order and without gaps."""
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
