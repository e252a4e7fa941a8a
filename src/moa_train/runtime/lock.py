"""Lock a run folder, so that only one process uses it. The lock is released when the process ends."""

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
from moa_train.runtime.files import write_all

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems that do not support locks."""
log = logging.getLogger(__name__)


class RunLock:
    """Hold ``<run_dir>/.lock`` inside a ``with`` block. A second process gets a UserError that names the holder.

    The lock is a kernel lock (flock) on the file, and the mere existence of the file has no meaning. The kernel
    releases the lock however the process ends, so a stale file needs no cleanup. The file is never removed, because
    removing it could race with the next process that opens it. Forked children close their copy immediately;
    otherwise, an orphaned loader worker would keep the folder locked.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": shlex.join(sys.orig_argv),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            os.register_at_fork(after_in_child=self._forget)
            self._lock(self._descriptor)
            os.ftruncate(self._descriptor, 0)
            write_all(self._descriptor, json.dumps(holder).encode())
        except OSError as error:
            self._forget()
            raise UserError(
                f"Cannot write {self.path}, which reserves the run folder: {error.strerror}. Free some space, fix the "
                "permissions or the storage, or choose another run folder."
            ) from error
        except UserError:
            self._forget()
            raise
        return self

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"The run folder {self.path.parent} is in use by {_describe(os.pread(descriptor, 65536, 0))}. "
                    "Wait for that run, stop it, or choose another run folder."
                ) from None
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s: this file system does not support locks (%s). Make sure that only one run uses the folder.",
                *(self.path, error.strerror),
            )

    def _forget(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)  # `holder` does not see the lock
        self._forget()


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command'][:120]})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def holder(run_dir: Path) -> int | None:
    """Return the process of this machine that uses a run folder, or None. This takes no lock, so it disturbs no run."""
    try:
        found = json.loads((run_dir / ".lock").read_bytes())
        pid = int(found["pid"])
        if found["host"] != socket.gethostname():
            return None
        os.kill(pid, 0)
    except PermissionError:  # of another user
        return pid
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # not Linux
        return pid
    return None if state == "Z" else pid
