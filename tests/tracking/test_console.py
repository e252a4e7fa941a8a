import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
import time
from fractions import Fraction
from typing import Any, TextIO

import pytest

from moa_train.tracking.console import Console, EvaluationProgress, block, clock_time

METRICS = {"loss": 1.23456, "lr": 9e-4, "images_per_second": 812.4, "memory": 1.25e9, "grad_norm": 1.0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(console: Console, clock: Clock, steps: range, log_every: int = 1, seconds: float = 1.0) -> None:
    for step in steps:
        clock.now += seconds
        console.advance(step)
        if step % log_every == 0:
            console.log_step(step, METRICS)


def test_plain_lines_if_the_output_is_not_a_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(100, 50, stream=stream, clock=clock, line_seconds=10)
    run(console, clock, range(1, 101))
    console.close()
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    # The first step, then one line every ten seconds, and the last step.
    assert [int(re.search(r"step (\d+)/100", line)[1]) for line in lines] == [*range(1, 100, 10), 100]  # type: ignore[index]
    assert lines[1] == "epoch 1/2  step 11/100  loss 1.2346  812 images/s  1:29 left  lr 9.0e-04  1.2 GB"
    assert lines[-1] == "epoch 2/2  step 100/100  loss 1.2346  812 images/s  0:00 left  lr 9.0e-04  1.2 GB"


def test_table_of_epochs_and_evaluations() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(40, 10, stream=stream, clock=clock, line_seconds=1e9)
    run(console, clock, range(1, 11))
    console.log_eval(10, {"loss": 2.0, "top1": 34.5, "top5": 70.123, "best": True})
    run(console, clock, range(11, 26))
    console.log_eval(25, {"loss": 1.5, "top1": 50.0}, "test")
    run(console, clock, range(26, 41))
    console.close()
    table = [line for line in stream.getvalue().splitlines() if not line.startswith("epoch ")]
    assert [line.split() for line in table] == [
        ["epoch", "step", "split", "loss", "top-1", "top-5", "train", "loss", "images/s", "time"],
        ["1", "10", "val", "2.0000", "34.50", "70.12", "1.2346", "812", "0:10", "best"],
        ["2", "20", "-", "-", "-", "-", "1.2346", "812", "0:21"],
        ["2.50", "25", "test", "1.5000", "50.00", "-", "1.2346", "812", "0:25"],
        ["3", "30", "-", "-", "-", "-", "1.2346", "812", "0:31"],
        ["4", "40", "-", "-", "-", "-", "1.2346", "812", "0:40"],
    ]
    assert len({len(line.removesuffix("  best")) for line in table}) == 1  # aligned


def test_train_loss_is_weighted_with_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(10, 10, stream=stream, clock=clock)
    console.advance(8)
    console.log_step(8, {"loss": 1.0})
    console.log_step(10, {"loss": 6.0})
    console.log_eval(10, {"loss": 1.0})
    assert "2.0000" in stream.getvalue().splitlines()[-1]


def test_epochs_that_are_not_a_whole_number_of_steps() -> None:
    """1,797 digits at batch size 100: 17.97 steps per epoch; epoch 100 ends exactly at step 1,797."""
    stream, clock = io.StringIO(), Clock()
    console = Console(1797, Fraction(1797, 100), stream=stream, clock=clock, line_seconds=1e9)
    run(console, clock, range(1, 1798))
    console.close()
    rows = [line.split() for line in stream.getvalue().splitlines() if not line.startswith("epoch")]
    ends = [(int(row[0]), int(row[1])) for row in rows if row[0].isdigit()]
    assert ends == [(epoch, -(-epoch * 1797 // 100)) for epoch in range(1, 101)]


def test_three_epochs_of_digits_do_not_start_a_fourth() -> None:
    stream, clock = io.StringIO(), Clock()
    run(Console(61, Fraction(1295, 64), stream=stream, clock=clock, line_seconds=1e9), clock, range(1, 62))
    assert stream.getvalue().splitlines()[-1].startswith("epoch 3/3  step 61/61")


def test_resumed_in_the_middle_of_an_epoch() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(40, 10, first_step=15, stream=stream, clock=clock, line_seconds=1e9)
    run(console, clock, range(16, 24))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("epoch 2/4  step 16/40")
    assert [line.split()[:2] for line in lines[2:]] == [["2", "20"]]


def test_time_spent_evaluating_does_not_count_as_training() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(100, 50, stream=stream, clock=clock, line_seconds=0)
    run(console, clock, range(1, 51))
    clock.now += 1000
    console.log_eval(50, {"loss": 1.0})
    run(console, clock, range(51, 61))
    assert "0:40 left" in stream.getvalue().splitlines()[-1]


def test_a_long_evaluation_shows_its_progress() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = EvaluationProgress("evaluating c/test", stream=stream, clock=clock)
    for _ in range(2):  # two evaluations
        for done in range(1, 26):
            clock.now += 1
            progress(done, 25)
    lines = ["evaluating c/test  batch 11/25  0:14 left", "evaluating c/test  batch 21/25  0:04 left"]
    assert stream.getvalue().splitlines() == lines * 2


def test_a_short_evaluation_writes_no_line_and_leaves_no_bar() -> None:
    for style in ("plain", "bar"):
        stream = io.StringIO()
        progress = EvaluationProgress("evaluating", style=style, stream=stream, clock=Clock())
        for done in (1, 2, 3):
            progress(done, 3)
        assert screen(stream.getvalue(), 200) == [""]
        assert ("batch" in stream.getvalue()) == (style == "bar")


def test_missing_and_non_finite_metrics_are_accepted() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(10, 10, stream=stream, clock=clock, line_seconds=0)
    console.advance(1)
    console.log_step(1, {})
    console.advance(2)
    console.log_step(2, {"loss": float("nan"), "lr": None, "memory": 0})
    console.log_eval(2, {})
    assert "loss nan" in stream.getvalue()


def test_a_bar_can_be_forced() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(3, 3, style="bar", stream=stream, clock=clock)
    run(console, clock, range(1, 4))
    console.close()
    assert "\r" in stream.getvalue()


def demonstrate(console: Console, stream: TextIO) -> None:
    console.say("hello")
    for step in range(1, 61):
        time.sleep(0.01)
        console.advance(step)
        if step % 5 == 0:
            console.log_step(step, {"loss": 1.5, "lr": 9e-4, "images_per_second": 812.4, "memory": 1.25e9})
        if step == 20:
            progress = EvaluationProgress("evaluating val", stream=stream)
            for done in range(1, 31):
                time.sleep(0.01)
                progress(done, 30)
            console.log_eval(step, {"loss": 1.0, "top1": 50.0, "top5": 75.0, "best": True})
    console.close()
    console.say("goodbye")


def on_a_terminal(columns: int) -> str:
    """Return the bytes that a console writes to a pseudo-terminal, as text."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []

    def receive() -> None:
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(primary, 65536):
                received.append(chunk)

    reader = threading.Thread(target=receive)
    reader.start()
    with os.fdopen(secondary, "w", encoding="utf-8") as stream:
        demonstrate(Console(60, 20, stream=stream), stream)
    reader.join()
    os.close(primary)
    return b"".join(received).decode()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def screen(text: str, columns: int) -> list[str]:
    """Interpret text as a terminal does: carriage return, line feed, cursor up, styles."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|.", text, re.DOTALL):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
            assert column <= columns, f"a line is longer than the terminal: {lines[row]}"
    return [line.rstrip() for line in lines]


def test_bar_on_a_real_terminal() -> None:
    text = on_a_terminal(100)
    assert text.count("\r") > 10
    lines = screen(text, 100)
    assert lines[0] == "hello"
    assert lines[1].split() == ["epoch", "step", "split", "loss", "top-1", "top-5", "train", "loss", "images/s", "time"]
    assert lines[2].split()[:7] == ["1", "20", "val", "1.0000", "50.00", "75.00", "1.5000"]
    assert lines[3].split()[:2] == ["2", "40"]
    assert lines[4].split()[:2] == ["3", "60"]
    assert re.fullmatch(
        r"epoch 3/3 \|█+\| 100%  step 60/60  loss 1.5000  812 images/s  0:00 left  lr 9.0e-04( {2}1.2 GB)?", lines[5]
    )
    assert lines[6:] == ["goodbye", ""]
    assert re.search(r"evaluating val \|█.*batch \d+/30  0:0\d left", text)  # for a while
    assert "\x1b[1m" in text


def test_a_narrow_terminal_keeps_the_bar_and_omits_the_least_important_values() -> None:
    lines = screen(on_a_terminal(80), 80)
    bar = next(line for line in lines if "60/60" in line)
    assert re.fullmatch(r"epoch 3/3 \|█{10,}\| 100%  step 60/60  loss 1.5000  812 images/s  0:00 left", bar)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1m" not in on_a_terminal(100)


def test_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    text = on_a_terminal(100)
    assert "\x1b" not in text
    assert "\r" not in text.replace("\r\n", "\n")  # the terminal's own line ends


def test_no_thread_is_left_behind() -> None:
    """tqdm starts a monitoring thread by default."""
    before = threading.active_count()
    clock = Clock()
    console = Console(60, 20, style="bar", stream=io.StringIO(), clock=clock)
    run(console, clock, range(1, 31))
    assert threading.active_count() == before
    console.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (183845, "2d 03:04:05")],
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def test_block() -> None:
    rows: dict[str, Any] = {"device": "cpu", "precision": "bf16", "resumed": None, "run folder": "outputs/a"}
    assert block("moa-train", rows).splitlines() == [
        "moa-train",
        "  device      cpu",
        "  precision   bf16",
        "  run folder  outputs/a",
    ]
