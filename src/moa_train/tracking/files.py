"""Write text files atomically, and name the file in errors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_flushed


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
