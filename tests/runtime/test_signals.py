import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from moa_train.runtime.signals import Exit, StopSignals

LOOP = """
import sys, time
from moa_train.runtime.signals import Exit, StopSignals
with StopSignals() as stop:
    stop.watched = "early" not in sys.argv
    print("ready", flush=True)
    while not (stop.requested and "stubborn" not in sys.argv):
        time.sleep(0.01)
    print(stop.received.name)
sys.exit(Exit.STOPPED)
"""


@pytest.fixture
def launch() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start processes that do not outlive their test."""
    with contextlib.ExitStack() as running:

        def launch(command: list[str], **options) -> subprocess.Popen:
            process = running.enter_context(subprocess.Popen(command, **options))
            running.callback(process.kill)
            return process

        yield launch


@pytest.fixture
def started(launch) -> Callable[..., subprocess.Popen]:
    """Start the loop, with these arguments, and come back when it is ready."""

    def started(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [*before, sys.executable, "-c", LOOP, *arguments]
        process = launch(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    return started


@pytest.mark.parametrize("number", StopSignals.HANDLED)
def test_each_signal_lets_the_loop_end_by_itself(started, number):
    process = started()
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output.strip()) == (75, number.name)


@pytest.mark.parametrize("number", StopSignals.HANDLED)
def test_before_anybody_looks_at_the_flag_each_signal_leaves_at_once(started, number):
    process = started("early", "stubborn")
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (75, "", "")


def test_the_first_ctrl_c_is_answered_at_once(started):
    process = started("stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "SIGINT: saving and stopping" in process.stderr.readline()


def test_a_second_ctrl_c_leaves_at_once(started):
    process = started("stubborn")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == Exit.INTERRUPTED == 130
    assert "without saving" in errors


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in StopSignals.HANDLED]
    with StopSignals() as stop:
        stop.watched = True
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
    assert [signal.getsignal(number) for number in StopSignals.HANDLED] == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("number", "end"),
    [(signal.SIGINT, "exit 0"), (signal.SIGUSR1, "exit 0"), (signal.SIGHUP, "exit 0"), (signal.SIGTERM, "signal 15")],
)
def test_forked_children_leave_ctrl_c_to_their_parent_and_can_be_terminated(number, end):
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert not stop.requested
    ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    assert ended == end


@pytest.mark.parametrize("early", [(), ("early", "stubborn")])
def test_a_closed_terminal_is_a_stop_like_any_other(launch, early):
    """Nothing can be printed there any more, which must not end the process before it has saved."""
    ours, terminal = pty.openpty()
    process = launch([sys.executable, "-c", LOOP, *early], stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    said = b""
    while not said.endswith(b"\n"):  # a terminal passes on what it has
        said += os.read(ours, 100)
    assert said == b"ready\r\n"
    os.close(ours)
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=10) == Exit.STOPPED


def test_a_pipe_into_what_the_terminal_has_ended_is_no_error(started):
    process = started()
    process.stdout.close()  # as when tee is gone
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=10) == Exit.STOPPED
    assert "SIGHUP: saving and stopping" in process.stderr.read()


@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_under_nohup_a_closed_terminal_is_ignored(started):
    process = started(before=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (Exit.STOPPED, "SIGTERM\n")
