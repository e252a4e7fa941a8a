"""What every writer of metrics offers. Steps count the updates that were done."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_flushed

Metrics = Mapping[str, float | int | str | bool | None]


class Writer:
    """Receives what the trainer reports; each method does nothing unless a writer has a use for it.

    Accuracies are in percent, times in seconds, memory in bytes.
    """

    def advance(self, step: int) -> None:
        """Note that ``step`` updates are done; called at every step, so it must cost next to nothing."""

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Write training metrics: loss, rate, grad_norm, images_per_second, memory, ..."""

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Write the result of an evaluation: loss, top1, top5, ..."""

    def log_images(self, step: int, images: Tensor) -> None:
        """Write a sample of the input: uint8, B C H W with 1 or 3 channels."""

    def say(self, text: str) -> None:
        """Tell the person at the console."""

    def close(self, final: Metrics | None = None) -> None:
        """Write what is left. ``final`` holds the final metrics of a training that came to its end."""


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: readers find the old content or all of the new one, after a kill as well.

    Raises:
        UserError: it cannot be written.
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
    """Raise UserError that names ``path`` instead of an OSError (a full disk, a quota, missing permissions)."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Free some space or fix the permissions, then resume the run."
        ) from error
