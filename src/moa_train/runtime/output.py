"""Standard output and standard error that never stop a training: what cannot be printed is dropped."""

import atexit
import os
import sys
from typing import Any


def protect_output() -> None:
    """Let prints succeed even if nobody can read them.

    A reader may go away (``moa-train | head``, or ``tee`` that Ctrl-C ends first), a disk behind a redirection may be
    full, a stream may be closed (``>&-``). A training must not end or lose its checkpoint because of that. Characters
    that the stream's encoding lacks are escaped.
    """
    for descriptor in range(3):  # in order, because opening a file takes the lowest free number
        try:
            os.fstat(descriptor)
        except OSError:  # closed; a data file must not get this number and then receive the prints
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 open until the process ends
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, _Lenient):
            setattr(sys, name, _Lenient(stream))
            atexit.register(getattr(sys, name).flush)


class _Lenient:
    """A text stream that drops what it cannot write."""

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
        """Send everything else, including what is still buffered, to the null device."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError, AttributeError):
            pass
