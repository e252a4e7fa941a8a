"""A TensorBoard event file, written in the calling thread."""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from moa_train.tracking.files import writing

_PREFIX = "events.out.tfevents."


class EventFile:
    """Create an event file in ``folder`` for a session that starts at ``first_step``.

    The writers of torch and tensorboard queue events for a thread: a kill loses the queue, and a full disk ends the
    thread, which then blocks the training. This class passes each event to the operating system immediately (20 us).

    TensorBoard hides the events of ``first_step`` and later in earlier files of the folder. It orders files by the
    time in their names, so that time must increase even if the clock is set back.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"{_PREFIX}{_time_after_all(folder):010d}.{socket.gethostname()}.{os.getpid()}"
            self._file = self._path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Any, step: int = 0) -> None:
        """Write a ``Summary`` message."""
        self._write(step=step, summary=summary)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # only data whose write has failed already can be pending
            self._file.close()

    def _write(self, **fields: Any) -> None:
        with writing(self._path):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()


def _time_after_all(folder: Path) -> int:
    """Return the time in whole seconds, or one second after the latest time in a file name if that is later."""
    stamps = (path.name.removeprefix(_PREFIX).split(".")[0] for path in folder.glob(f"{_PREFIX}*"))
    return max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])
