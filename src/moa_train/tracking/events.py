"""A TensorBoard event file that is written in the calling thread."""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from moa_train.tracking.writers import writing

_PREFIX = "events.out.tfevents."


class EventFile:
    """A new event file in ``folder``, for a session that begins at ``first_step``.

    torch's and tensorboard's own writers queue events for a thread: a kill loses the queue, and a full disk ends the
    thread while the training waits for it. Here each event is handed to the system at once, some 20 us.
    TensorBoard hides what earlier files of the folder hold at ``first_step`` or later. It reads files in the
    order of the time in their names, so that is made to increase even where the clock is set back.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f"{_PREFIX}{_time_after_all(folder):010d}.{socket.gethostname()}.{os.getpid()}"
            self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Any, step: int = 0) -> None:
        """Write a ``Summary`` message."""
        self._write(step=step, summary=summary)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # it has nothing to write but what failed before
            self._file.close()

    def _write(self, **fields: Any) -> None:
        with writing(self.path):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()


def _time_after_all(folder: Path) -> int:
    """Return the time in whole seconds, or one second more than the latest in a file's name."""
    stamps = (path.name.removeprefix(_PREFIX).split(".")[0] for path in folder.glob(f"{_PREFIX}*"))
    return max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])
