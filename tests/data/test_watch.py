"""Reading files in other processes: time limits, and processes that are killed."""

import os
import signal
import time
from pathlib import Path

import pytest

from moa_train.data import watch
from moa_train.data.watch import FileWatch, decoding, map_files, reading_file
from moa_train.runtime.errors import UserError


def die_of(path: str) -> str:
    if path == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return path


def read(path: str) -> str:
    with reading_file(Path(path)):
        if path == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return path


def test_results_are_in_order() -> None:
    paths = [str(number) for number in range(100)]
    assert list(map_files(die_of, paths, 3, 60.0)) == paths
    assert list(map_files(die_of, [], 1, 60.0)) == []


def test_a_process_that_is_killed_is_an_error() -> None:
    with pytest.raises(UserError, match=r"was killed, perhaps because memory ran out.*: b\."):
        list(map_files(read, ["a", "b", "c"], 1, 60.0))


def test_the_end_of_one_iteration_leaves_the_processes_of_another() -> None:
    """An iteration that an error abandoned ends when the garbage collector finds it."""
    abandoned = map_files(str.upper, ["a", "b"], 1, 60.0)
    assert next(abandoned) == "A"
    other = map_files(str.upper, [str(number) for number in range(100)], 1, 60.0)
    assert next(other) == "0"
    abandoned.close()
    assert len(list(other)) == 99


def test_time_in_which_all_processes_were_suspended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LONGEST", 0.1)
    files = FileWatch(1, 0.45)
    files.begin(0)
    with reading_file(Path("a.jpg")):
        decoding()
        time.sleep(0.5)  # without a check, as if this process was suspended as well
        files.check()
        for _ in range(3):
            time.sleep(0.1)
            files.check()
        time.sleep(0.1)
        with pytest.raises(UserError, match=r"a\.jpg: decoding takes longer than data\.max_seconds=0\.45"):
            files.check()
    files.check()
