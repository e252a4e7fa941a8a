"""Show this process which files its worker processes are reading, and for how long they have been decoding them.

A signal handler or a thread in the worker could not interrupt a decoder, because Python code does not run inside it.
This process can end the worker.
"""

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.sharedctypes import RawArray, Synchronized
from pathlib import Path
from typing import TypeVar

from moa_train.runtime.errors import UserError
from moa_train.schema import RuntimeConfig

Result = TypeVar("Result")

_POLL = 1.0
"""Seconds between checks while a result is awaited."""


class _Slot(ctypes.Structure):
    _fields_ = (("decoding_since", ctypes.c_double), ("path", ctypes.c_char * 4096))


_mine = _Slot()
"""What this process is reading."""


class FileWatch:
    """Shared memory with the current file of each worker process.

    Args:
        workers: number of processes.
        max_seconds: longest time to decode an image.
    """

    def __init__(self, workers: int, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self._slots = RawArray(_Slot, workers)

    def __len__(self) -> int:
        return len(self._slots)

    def begin(self, worker: int) -> None:
        """Publish the files of this process as those of worker number ``worker``."""
        global _mine
        _mine = self._slots[worker]

    def check(self) -> None:
        """Raise UserError if a worker has been decoding an image for more than ``max_seconds``."""
        for slot in self._slots:
            if slot.decoding_since and time.monotonic() - slot.decoding_since > self.max_seconds:
                raise UserError(
                    f"{_name(slot)}: decoding takes longer than data.max_seconds={self.max_seconds:g} (moa-data: "
                    "--max-seconds). Repair or remove the file, or increase the limit."
                )

    def files(self) -> str:
        """Return the paths that the workers are reading, separated by commas."""
        return ", ".join(_name(slot) for slot in self._slots if slot.path)


@contextmanager
def reading_file(path: Path) -> Iterator[None]:
    """Publish that this process reads a file."""
    _mine.path = os.fsencode(path)[:4095]
    try:
        yield
    finally:
        _mine.decoding_since, _mine.path = 0.0, b""


def decoding() -> None:
    """Publish that the file has been read from storage, and that decoding begins."""
    if _mine.path:
        _mine.decoding_since = time.monotonic()


def _name(slot: _Slot) -> str:
    return slot.path.decode(errors="backslashreplace")


def map_files(
    function: Callable[[str], Result], paths: Iterable[str], workers: int, max_seconds: float
) -> Iterator[Result]:
    """Yield the result of ``function`` for every file, in order, computed in ``workers`` processes (at least one).

    Raises:
        UserError: an image takes too long to decode, or the storage hangs.
    """
    workers = max(1, workers)
    watch, number = FileWatch(workers, max_seconds), multiprocessing.Value("i", 0)
    with multiprocessing.Pool(workers, _begin, (watch, number)) as pool:  # at the end, its processes are killed
        rest, waited = iter(paths), 0.0
        chunks = iter(lambda: list(islice(rest, 8)), [])
        results = pool.imap(partial(_map, function), chunks)
        while True:
            try:
                yield from results.next(_POLL)
                waited = 0.0
            except StopIteration:
                return
            except multiprocessing.TimeoutError:
                watch.check()
                waited += _POLL
                if waited >= RuntimeConfig.timeout:
                    raise UserError(
                        f"No images could be read for {waited:.0f} s: the storage hangs, or is very slow. Files that "
                        f"are being read: {watch.files() or 'none'}."
                    ) from None


def _map(function: Callable[[str], Result], paths: list[str]) -> list[Result]:
    return [function(path) for path in paths]


def _begin(watch: FileWatch, number: "Synchronized[int]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    with number.get_lock():
        watch.begin(number.value % len(watch))
        number.value += 1
