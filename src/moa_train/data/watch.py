"""Show this process which files its worker processes are reading, and for how long they have been decoding them.

A signal handler or a thread in the worker could not interrupt a decoder, because Python code does not run inside it.
This process can end the worker.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.sharedctypes import RawArray, Synchronized
from pathlib import Path
from typing import TypeVar

from moa_train.runtime.errors import UserError
from moa_train.schema import RuntimeConfig

Result = TypeVar("Result")

_POLL = 1.0
"""Seconds between checks while a result is awaited."""
_LONGEST = 5.0
"""Longest time between two checks, in seconds, that counts. If it was longer, all processes may have been suspended."""


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
        self._checked = time.monotonic()
        self._decoding = [(0.0, 0.0)] * workers

    def __len__(self) -> int:
        return len(self._slots)

    def begin(self, worker: int) -> None:
        """Publish the files of this process as those of worker number ``worker``."""
        global _mine
        _mine = self._slots[worker]

    def check(self) -> None:
        """Raise UserError if a worker has been decoding an image for more than ``max_seconds``."""
        now = time.monotonic()
        passed, self._checked = min(now - self._checked, _LONGEST), now
        for worker, slot in enumerate(self._slots):
            since, seconds = self._decoding[worker]
            seconds = seconds + passed if slot.decoding_since == since else min(now - slot.decoding_since, passed)
            self._decoding[worker] = slot.decoding_since, seconds
            if slot.decoding_since and seconds > self.max_seconds:
                raise UserError(
                    f"{_name(slot)}: decoding takes longer than data.max_seconds={self.max_seconds:g} (moa-data: "
                    "--max-seconds, moa-predict: max_seconds). Repair or remove the file, or increase the limit."
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


def start_method() -> str | None:
    """Return how worker processes are started: forked on Linux, and elsewhere as Python prefers.

    Python 3.14 prefers a server that forks. torchrun's signals end that server, and with it the workers, in the middle
    of a save.
    """
    return "fork" if sys.platform.startswith("linux") else None


def map_files(
    function: Callable[[str], Result], paths: Iterable[str], workers: int, max_seconds: float
) -> Iterator[Result]:
    """Yield the result of ``function`` for every file, in order, computed in ``workers`` processes (at least one).

    Raises:
        UserError: an image takes too long to decode, the storage hangs, or a process was killed.
    """
    workers = max(1, workers)
    context = multiprocessing.get_context(start_method())
    watch, number = FileWatch(workers, max_seconds), context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(watch, number))
    rest, pending, waited = iter(paths), deque[Future[list[Result]]](), 0.0
    try:
        while True:
            while len(pending) < 4 * workers and (chunk := list(islice(rest, 8))):
                pending.append(pool.submit(_map, function, chunk))
            if not pending:
                return
            wait([pending[0]], _POLL)
            if pending[0].done():
                yield from pending.popleft().result()
                waited = 0.0
                continue
            watch.check()
            waited += _POLL
            if waited >= RuntimeConfig.timeout:
                raise UserError(
                    f"No images could be read for {waited:.0f} s: the storage hangs, or is very slow. Files that are "
                    f"being read: {watch.files() or 'none'}."
                )
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, perhaps because memory ran out; use fewer workers. It was reading one of "
            f"these files: {watch.files() or 'unknown'}."
        ) from error
    finally:
        processes = list(pool._processes.values())  # other iterations have their own
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _map(function: Callable[[str], Result], paths: list[str]) -> list[Result]:
    return [function(path) for path in paths]


def _begin(watch: FileWatch, number: "Synchronized[int]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    with number.get_lock():
        watch.begin(number.value % len(watch))
        number.value += 1
