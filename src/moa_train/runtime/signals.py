"""Asking a run to stop: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (SLURM's warning) and SIGHUP only raise a flag.

SIGHUP says that the terminal is gone; under nohup it is ignored, as before. The loop looks at the flag once per
micro-batch, saves, and leaves with ``Exit.STOPPED``: the same command continues the run. Before the loop there is
nothing to save, and the process leaves with that code at once.
"""

import contextlib
import os
import select
import signal
import threading
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Self


class Exit(IntEnum):
    """Exit codes of the commands (under torchrun they are those of the workers; torchrun itself exits with 1)."""

    FINISHED = 0
    FAILED = 1
    """An exception: a bug, or a machine that broke. The traceback is printed."""
    USER_ERROR = 2
    """Something the user can mend; the message says how."""
    STOPPED = 75
    """Stopped by a signal with everything saved (EX_TEMPFAIL of sysexits.h: try again to continue)."""
    INTERRUPTED = 130
    """Ctrl-C, in training the second one: left at once (128 + SIGINT, as shells have it), without saving."""


class StopRequestedError(Exception):
    """A stop was requested while this process waited for something that may never come."""


class StopSignals:
    """While it is entered, the first signal of ``HANDLED`` sets ``requested`` and a second SIGINT leaves at once.

    That holds once somebody looks at the flag, which ``watched`` says; before, the first one raises SystemExit.

    Only the main thread may enter it (a rule of Python's). Of these signals forked children, such as loader workers,
    obey SIGTERM alone. The others reach them too, but their parent decides when they end.
    """

    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.watched = False
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the run has been asked to stop."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGHUP:
            _print_where_somebody_reads()
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if not self.watched:
            raise SystemExit(Exit.STOPPED)
        if first and os.environ.get("RANK", "0") == "0":
            hint = " Ctrl-C again leaves at once, without saving." if number == signal.SIGINT else ""
            _say(f"{self.received.name}: saving and stopping after the pass under way.{hint}")
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                _say("Second Ctrl-C: leaving at once, without saving.")
                os._exit(Exit.INTERRUPTED)

    def __enter__(self) -> Self:
        self._pid = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread handle signals: the program around decides about them
        for number in self.HANDLED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python and cannot be put back from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()


def _say(text: str) -> None:
    """Print a line on standard error, but not by print(), which may be what a signal has interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def _print_where_somebody_reads() -> None:
    """Let go of a terminal that is closed, and of pipes into what closed with it: printing there would be an error."""
    for descriptor in (1, 2):
        stream = select.poll()
        stream.register(descriptor, 0)  # is told of errors and hang-ups in any case
        if stream.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
