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
import signal, sys, time
if "nohup" not in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if pytest runs under nohup
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
    """A function that starts processes, which are killed at the end of the test."""
    with contextlib.ExitStack() as running:

        def launch(command: list[str], **options) -> subprocess.Popen:
            process = running.enter_context(subprocess.Popen(command, **options))
            running.callback(process.kill)
            return process

        yield launch


@pytest.fixture
def started(launch) -> Callable[..., subprocess.Popen]:
    """A function that starts the loop with the given arguments and waits until it is ready."""

    def started(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [*before, sys.executable, "-c", LOOP, *arguments]
        process = launch(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    return started


@pytest.mark.parametrize("number", StopSignals.HANDLED)
def test_each_signal_requests_a_stop(started, number):
    process = started()
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output.strip()) == (75, number.name)


@pytest.mark.parametrize("number", StopSignals.HANDLED)
def test_each_signal_exits_immediately_while_nothing_watches_the_flag(started, number):
    process = started("early", "stubborn")
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (75, "", "")


def test_the_first_ctrl_c_prints_a_message_immediately(started):
    process = started("stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "SIGINT: saving and stopping" in process.stderr.readline()


def test_a_second_ctrl_c_exits_immediately(started):
    process = started("stubborn")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == Exit.INTERRUPTED == 130
    assert "without saving" in errors


def test_handlers_are_restored():
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
def test_forked_children_ignore_ctrl_c_and_can_be_terminated(number, end):
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
def test_a_closed_terminal_requests_a_stop(launch, early):
    """The terminal accepts no more output, but the process must not end before it has saved."""
    ours, terminal = pty.openpty()
    process = launch([sys.executable, "-c", LOOP, *early], stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    output = b""
    while not output.endswith(b"\n"):  # a terminal may return fewer bytes
        output += os.read(ours, 100)
    assert output == b"ready\r\n"
    os.close(ours)
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=10) == Exit.STOPPED


def test_a_closed_pipe_is_not_an_error(started):
    process = started()
    process.stdout.close()  # as if tee had exited
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=10) == Exit.STOPPED
    assert "SIGHUP: saving and stopping" in process.stderr.read()


@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_under_nohup_a_closed_terminal_is_ignored(started):
    process = started("nohup", before=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (Exit.STOPPED, "SIGTERM\n")
