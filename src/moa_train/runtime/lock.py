"""One run, one folder: a lock that dies with its process."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from moa_train.runtime.errors import UserError

log = logging.getLogger(__name__)


class RunLock:
    """Holds ``<run_dir>/.lock`` while it is entered; whoever comes second gets a UserError that names the holder.

    The kernel's lock is what counts (flock), not that the file exists: it goes when its process dies, however it dies,
    so a stale file needs no cleaning up. The file stays, since removing it could race with the next one to open it.
    Forked children give up their copy at once, or an orphaned loader worker would keep the folder locked.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"Cannot write to the run folder {self.path.parent}: {error.strerror}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = _describe(os.pread(descriptor, 65536, 0))
                os.close(descriptor)
                raise UserError(
                    f"The run folder {self.path.parent} is in use by {holder}. "
                    "Wait for it, stop it, or choose another run folder."
                ) from None
            log.warning("%s: this file system has no locks (%s); mind that one run uses it.", self.path, error)
        self._descriptor = descriptor
        os.register_at_fork(after_in_child=self._forget)
        holder_json = json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "command": shlex.join(sys.orig_argv),
            }
        )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder_json.encode(), 0)
        return self

    def _forget(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command'][:120]})"
    except (ValueError, KeyError, TypeError):
        return "another process"
