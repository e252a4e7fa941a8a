"""Files on storage that may fail: nothing is taken for written, nor for absent, because a system call has failed."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moa_train.runtime.errors import UserError

Bytes = bytes | memoryview


def write_all(descriptor: int, data: Bytes) -> None:
    """Write all of ``data``; raises OSError if the system refuses it, or accepts none of it (`write` returns 0)."""
    rest = memoryview(data).cast("B")
    while rest:
        written = os.write(descriptor, rest)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepts no data (write returned 0)")
        rest = rest[written:]


def write_flushed(path: Path, data: Bytes) -> None:
    """Write a file and flush it to the disk; raises OSError, also if only closing the file reports the failure."""
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), data)
        os.fsync(file.fileno())


def file_type(path: Path, *, follow_links: bool = True) -> int | None:
    """Return the type of a file (`stat.S_IFDIR`, ...), or None if there is none.

    Unlike `Path.is_dir` and its like, which return False for some failures of the system (for all since Python 3.14),
    it raises OSError where the answer is not known.
    """
    try:
        return stat.S_IFMT(path.stat(follow_symlinks=follow_links).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: readers find the whole new text or the previous one, even after a kill.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            write_flushed(temporary, text.encode())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk or missing permissions, into an error that names ``path``.

    Raises:
        UserError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Free some space or fix the permissions, then resume the run."
        ) from error
