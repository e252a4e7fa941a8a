"""Handle stop signals: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (SLURM's warning) and SIGHUP (the terminal was closed).

A signal sets a flag. The training loop checks the flag once per micro-batch, saves, and exits with ``Exit.STOPPED``;
the same command resumes the run. Before the loop starts, there is nothing to save, and the process exits with that code
immediately. Under nohup, SIGHUP stays ignored.
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
    """An exception was raised, by a bug or a machine failure. The traceback is printed."""
    USER_ERROR = 2
    """The user can fix the problem; the message explains how."""
    STOPPED = 75
    """A signal stopped the run; everything is saved (EX_TEMPFAIL in sysexits.h: run the command again to resume)."""
    INTERRUPTED = 130
    """Ctrl-C (during training, the second one) exited the process immediately, without saving (128 + SIGINT)."""


class StopRequestedError(Exception):
    """Report that a stop was requested while this process waited for an event that may never happen."""


class StopSignals:
    """Handle the signals in ``HANDLED`` inside a ``with`` block: the first sets ``requested``, a second SIGINT exits.

    Until the training loop sets ``watched``, the first signal raises SystemExit instead.

    Outside the main thread, no handler is installed, because Python does not allow it. Forked children, such as loader
    workers, react only to SIGTERM; their parent decides when they end after any other signal.
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
        """Whether a signal has requested a stop."""
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
            hint = " Press Ctrl-C again to exit immediately, without saving." if number == signal.SIGINT else ""
            _say(f"{self.received.name}: saving and stopping after the current pass.{hint}")
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                _say("Second Ctrl-C: exiting immediately, without saving.")
                os._exit(Exit.INTERRUPTED)

    def __enter__(self) -> Self:
        self._pid = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals, so the calling program is responsible for them
        for number in self.HANDLED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # A handler of None was not installed by Python, so Python cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()


def _say(text: str) -> None:
    """Write a line to standard error without print(), because the signal may have interrupted a call of print()."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def _print_where_somebody_reads() -> None:
    """Redirect output to the null device if the terminal or the reader of a pipe was closed; printing would fail."""
    for descriptor in (1, 2):
        stream = select.poll()
        stream.register(descriptor, 0)  # poll always reports errors and hang-ups
        if stream.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
