import csv
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moa_train.runtime.errors import UserError
from moa_train.tracking.csv_file import CsvFile
from moa_train.tracking.jsonl import JsonLines, read_rows
from moa_train.tracking.tracker import Tracker


def open_both(run_dir: Path, first_step: int = 0) -> Tracker:
    return Tracker([JsonLines(run_dir / "metrics.jsonl", first_step), CsvFile(run_dir, first_step, {})])


def read(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def test_columns_that_appear_later(tmp_path: Path) -> None:
    tracker = open_both(tmp_path)
    tracker.log_step(1, {"loss": 0.1 + 0.2, "lr": 1e-3})
    tracker.log_eval(1, {"top1": 50.0, "best": True}, "val")
    tracker.log_step(2, {"loss": math.nan, "lr": 1e-3})
    expected = [  # while it is open
        "kind,step,loss,lr,split,top1,best",
        "train,1,0.30000000000000004,0.001,,,",
        "eval,1,,,val,50.0,True",
        "train,2,,0.001,,,",
    ]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == expected
    tracker.close()
    open_both(tmp_path, first_step=3).close()  # another session writes the same
    assert (tmp_path / "metrics.csv").read_text().splitlines() == expected


def test_a_logger_that_is_added_later_has_all_rows(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(5):
        rows.log_step(step, {"loss": 1.0})
    rows.close()
    tracker = open_both(tmp_path, first_step=3)
    tracker.log_step(3, {"loss": 2.0})
    tracker.close()
    assert [(row["step"], row["loss"]) for row in read(tmp_path)] == [
        ("0", "1.0"),
        ("1", "1.0"),
        ("2", "1.0"),
        ("3", "2.0"),
    ]


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    tracker = open_both(tmp_path)
    tracker.log_step(1, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.csv").stat().st_size, hard))  # less than the JSON
    try:
        with pytest.raises(UserError, match=r"metrics\.csv cannot be written: File too large"):
            CsvFile(tmp_path, 0, {}).log_step(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        tracker.close()


KILLED = """
import sys
from pathlib import Path
from moa_train.tracking.csv_file import CsvFile
from moa_train.tracking.jsonl import JsonLines
run_dir, first = Path(sys.argv[1]), int(sys.argv[2])
loggers = JsonLines(run_dir / "metrics.jsonl", first), CsvFile(run_dir, first, {})
for step in range(first, 10**9):
    for logger in loggers:
        logger.log_step(step, {"loss": step / 7, "text": "x" * 5000})
        if step % 10 == 0:
            logger.log_eval(step, {f"metric{step % 70}": float(step)})
    print(step, flush=True)
"""


def test_sigkill_while_writing_then_resume(tmp_path: Path) -> None:
    """After a kill and a resume from an earlier step, the table equals metrics.jsonl: no step twice, no partial row."""
    first = 0
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(first)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while int(process.stdout.readline()) < first + 100:
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        first += 90
        open_both(tmp_path, first).close()
        rows = read_rows(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(first))
        table = [{key: value for key, value in row.items() if value} for row in read(tmp_path)]
        assert table == [{key: str(value) for key, value in row.items()} for row in rows]
