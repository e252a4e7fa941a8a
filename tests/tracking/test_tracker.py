import io
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moa_train.runtime.errors import UserError
from moa_train.tracking.csv_file import CsvFile
from moa_train.tracking.jsonl import read_rows
from moa_train.tracking.tensorboard import TensorBoard
from moa_train.tracking.tracker import open_tracker


def train(run_dir: Path, steps: range, stream: io.StringIO, resumed_step: int = 0) -> None:
    tracker = open_tracker(
        run_dir, total_steps=30, steps_per_epoch=10, resumed_step=resumed_step, loggers=[TensorBoard], stream=stream
    )
    if not resumed_step:
        tracker.log_images(0, torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    for step in steps:
        tracker.advance(step)
        tracker.log_step(step, {"loss": 1 / step})
        if step % 10 == 0:
            tracker.log_eval(step, {"top1": float(step)})
    tracker.close({"top1": 30.0} if steps[-1] == 30 else None)
    tracker.say("the end")


def test_every_logger_receives_everything_and_a_resume_continues(tmp_path: Path) -> None:
    stream = io.StringIO()
    train(tmp_path, range(1, 18), stream)
    train(tmp_path, range(11, 31), stream, resumed_step=10)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 31))
    assert [(row["step"], row["top1"]) for row in rows if row["kind"] == "eval"] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("accuracy/val_top1")] == [10, 20, 30]
    assert [event.step for event in events.Images("train/input")] == [0]
    assert stream.getvalue().count("the end") == 2


def test_an_evaluation_that_a_killed_session_logged_is_not_logged_again(tmp_path: Path) -> None:
    for remeasured, expected in ((False, [10]), (True, [10, 10])):
        train(tmp_path, range(1, 11), io.StringIO())
        tracker = open_tracker(
            tmp_path, total_steps=30, steps_per_epoch=10, resumed_step=10, remeasured=remeasured, stream=io.StringIO()
        )
        tracker.log_eval(10, {"top1": 10.0})
        tracker.close()
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "eval"] == expected


def test_a_run_that_starts_again_replaces_its_rows(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, range(1, 6), io.StringIO())
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(
        tmp_path, total_steps=30, steps_per_epoch=10, is_main=False, loggers=[TensorBoard, CsvFile], profile_steps=1
    )
    tracker.advance(1)
    tracker.log_step(1, {"loss": 1.0})
    tracker.log_eval(1, {"top1": 1.0})
    tracker.log_images(1, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    tracker.say("nothing")
    tracker.close({"top1": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


FULL = """
import io, sys
from pathlib import Path
from pkgutil import resolve_name
from moa_train.tracking.tracker import open_tracker
loggers = [resolve_name(f"moa_train.tracking.{name}") for name in sys.argv[2:]]
tracker = open_tracker(Path(sys.argv[1]), total_steps=10**6, steps_per_epoch=10, loggers=loggers, stream=io.StringIO())
try:
    for step in range(1, 10**6):
        tracker.log_step(step, {"loss": 1.0})
finally:
    tracker.close()
"""


@pytest.mark.parametrize(
    ("loggers", "name"),
    [([], r"metrics\.jsonl"), (["tensorboard:TensorBoard"], r"tensorboard/events\.out\.\S+")],
)
def test_a_full_disk_is_reported_at_once_and_keeps_the_rows_before(
    tmp_path: Path, loggers: list[str], name: str
) -> None:
    def fill() -> None:  # files of the child may not grow beyond 2,000 bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    command = [sys.executable, "-c", FULL, str(tmp_path), *loggers]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, preexec_fn=fill)
    pattern = rf"moa_train\.runtime\.errors\.UserError: {tmp_path}/{name} cannot be written: File too large\..*"
    assert re.fullmatch(pattern, done.stderr.splitlines()[-1])
    steps = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert steps


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: Not a directory"):
        open_tracker(tmp_path / "file", total_steps=3, steps_per_epoch=3)
    (tmp_path / "tensorboard").touch()
    tracker = open_tracker(tmp_path, total_steps=3, steps_per_epoch=3, loggers=[TensorBoard], stream=io.StringIO())
    with pytest.raises(UserError, match=r"tensorboard cannot be written: File exists"):
        tracker.log_step(1, {"loss": 1.0})
    tracker.close()
