"""Asking a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM's warning before pre-emption) only raise a flag.

The loop looks at the flag once per micro-batch, saves, and leaves with ``Exit.STOPPED``: the same command continues the
run. Before the loop there is nothing to save, and the process leaves with that code at once.
"""

import os
import signal
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


class StopSignals:
    """While it is entered, the first SIGTERM, SIGINT or SIGUSR1 sets ``requested`` and a second SIGINT leaves at once.

    That holds once somebody looks at the flag, which ``watched`` says; before, the first one raises SystemExit.

    Only the main thread may enter it (a rule of Python's). Forked children, such as loader workers, ignore Ctrl-C and
    SIGUSR1, which reach them too: their parent decides when they end.
    """

    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

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
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if not self.watched:
            raise SystemExit(Exit.STOPPED)
        if first and os.environ.get("RANK", "0") == "0":
            hint = " Ctrl-C again leaves at once, without saving." if number == signal.SIGINT else ""
            # Not print(), which may be what was interrupted.
            os.write(2, f"\n{self.received.name}: saving and stopping after the pass under way.{hint}\n".encode())
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os.write(2, b"\nSecond Ctrl-C: leaving at once, without saving.\n")
                os._exit(Exit.INTERRUPTED)

    def __enter__(self) -> Self:
        self._pid = os.getpid()
        for number in self.HANDLED:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python and cannot be put back from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()
