"""Prevent failures of standard output and standard error from ending a run. Text that cannot be printed is dropped."""

import atexit
import os
import sys
from typing import Any, TextIO


def protect_output() -> None:
    """Let prints succeed even if the output cannot be written.

    The reader may have exited (``moa-train | head``, or a ``tee`` that Ctrl-C ended first), output may be redirected
    to a full disk, or a stream may be closed (``>&-``). None of these may end a run or cost it a checkpoint.
    Characters that the stream's encoding does not support are escaped.
    """
    for descriptor in range(3):  # in order, because a newly opened file gets the lowest free descriptor
        try:
            os.fstat(descriptor)
        except OSError:  # Closed. A data file must not get this descriptor, or prints would go into that file.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 stays open until the process ends
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, _Lenient):
            setattr(sys, name, _Lenient(stream))
            atexit.register(getattr(sys, name).flush)


def unprotected(stream: TextIO) -> TextIO:
    """Return a stream whose errors are raised, for a command whose product is what it prints."""
    return stream._stream if isinstance(stream, _Lenient) else stream


class _Lenient:
    """Wrap a text stream and drop text that it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Redirect all further output, including buffered text, to the null device."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError, AttributeError):
            pass
