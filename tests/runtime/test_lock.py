import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moa_train.runtime.errors import UserError
from moa_train.runtime.lock import RunLock

# Waits until the start time, takes the lock, reports it, and holds it until standard input is closed.
HOLDER = """
import os, sys, time
from pathlib import Path
from moa_train.runtime.lock import RunLock
run_dir, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, start - time.time()))
try:
    with RunLock(run_dir):
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def holder(run_dir: Path, start: float = 0.0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir), str(start)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_one_of_eight_simultaneous_processes_gets_the_lock(tmp_path):
    start = time.time() + 0.8
    processes = [holder(tmp_path / "run", start) for _ in range(8)]
    try:
        output = {process.pid: process.stdout.readline() for process in processes if process.stdout}
        winners = [pid for pid, line in output.items() if line == "held\n"]
        assert len(winners) == 1
        losers = [line for line in output.values() if line != "held\n"]
        # Before the winner has written its ID into the file, the message says "another process".
        assert all(f"process {winners[0]} on" in line or "another process" in line for line in losers)
    finally:
        for process in processes:
            process.communicate(timeout=10)


def test_the_error_names_the_holder_and_a_killed_holder_leaves_no_lock(tmp_path):
    process = holder(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError) as error, RunLock(tmp_path):
        pass
    assert f"process {process.pid} on" in str(error.value)
    assert "choose another run folder" in str(error.value)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid  # stale, but not locked
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    with RunLock(tmp_path):
        pass


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), RunLock(tmp_path):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_orphaned_child_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path).__enter__()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        with pytest.raises(UserError), RunLock(tmp_path):
            pass
        lock.__exit__(None, None, None)
        time.sleep(0.05)
        with RunLock(tmp_path):  # the child is still running
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_invalid_contents_of_the_lock_file_are_ignored(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff{not json")
    with RunLock(tmp_path):
        pass


def test_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(UserError, match="Cannot write"), RunLock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "precious"
