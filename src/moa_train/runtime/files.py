"""Read and write files on unreliable storage. A failed system call never makes a file count as written or absent."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moa_train.runtime.errors import UserError

Bytes = bytes | memoryview


def write_all(descriptor: int, data: Bytes) -> None:
    """Write all of ``data``. Raises OSError if the system reports an error or accepts no data (`write` returns 0)."""
    rest = memoryview(data).cast("B")
    while rest:
        written = os.write(descriptor, rest)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepts no data (write returned 0)")
        rest = rest[written:]


def write_file(path: Path, data: Bytes) -> None:
    """Write a file without flushing it to disk. Raises OSError, which names the file."""
    try:
        with path.open("wb", buffering=0) as file:
            write_all(file.fileno(), data)
    except OSError as error:
        error.filename = str(path)
        raise


def write_flushed(path: Path, data: Bytes) -> None:
    """Write a file and flush it to disk. Raises OSError, even if only closing the file reports the failure."""
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), data)
        os.fsync(file.fileno())


def file_type(path: Path, *, follow_links: bool = True) -> int | None:
    """Return the type of a file (`stat.S_IFDIR`, ...), or None if the file does not exist.

    `Path.is_dir` and similar methods return False for some system errors (for all of them since Python 3.14). This
    function raises OSError instead.
    """
    try:
        return stat.S_IFMT(path.stat(follow_symlinks=follow_links).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers see either the complete new content or the previous one, even after a kill.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            write_flushed(temporary, content.encode() if isinstance(content, str) else content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError, such as a full disk or missing permissions, to an error that names ``path``.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Free some space or fix the permissions, then repeat "
            "the command; resume a run that had started."
        ) from error
