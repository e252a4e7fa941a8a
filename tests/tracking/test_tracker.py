import io
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moa_train.tracking import open_tracker
from moa_train.tracking.jsonl import read_rows


def train(run_dir: Path, steps: range, stream: io.StringIO, resumed_step: int = 0) -> None:
    tracker = open_tracker(run_dir, total_steps=30, steps_per_epoch=10, resumed_step=resumed_step, stream=stream)
    if not resumed_step:
        tracker.log_images(0, torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    for step in steps:
        tracker.advance(step)
        tracker.log_step(step, {"loss": 1 / step})
        if step % 10 == 0:
            tracker.log_eval(step, {"top1": float(step)})
    tracker.close({"top1": 30.0} if steps[-1] == 30 else None)
    tracker.say("the end")


def test_every_writer_is_told_and_a_resume_continues(tmp_path: Path) -> None:
    stream = io.StringIO()
    train(tmp_path, range(1, 18), stream)
    train(tmp_path, range(11, 31), stream, resumed_step=10)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 31))
    assert [(row["step"], row["top1"]) for row in rows if row["kind"] == "eval"] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/top1")] == [10, 20, 30]
    assert [event.step for event in events.Images("train/input")] == [0]
    assert stream.getvalue().count("the end") == 2


def test_a_run_that_starts_over_hides_what_was_there(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, range(1, 6), io.StringIO())
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_other_ranks_write_nothing(tmp_path: Path, capfd: object) -> None:
    tracker = open_tracker(tmp_path, total_steps=30, steps_per_epoch=10, is_main=False)
    tracker.advance(1)
    tracker.log_step(1, {"loss": 1.0})
    tracker.log_eval(1, {"top1": 1.0})
    tracker.log_images(1, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    tracker.say("nothing")
    tracker.close({"top1": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")  # type: ignore[attr-defined]


def test_tensorboard_can_be_switched_off(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, total_steps=3, steps_per_epoch=3, tensorboard=False, stream=io.StringIO())
    tracker.log_step(1, {"loss": 1.0})
    tracker.close({"top1": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
