"""What every writer of metrics offers. Steps count the updates that were done."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from moa_train.runtime.errors import UserError

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
    """Write a file in one motion: whoever looks, after a kill too, finds all of it, or what was there before.

    Raises:
        UserError: where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name ``path`` where the system refuses to write it (a full disk, permissions).

    Raises:
        UserError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Make room or mend the permissions, then resume the run."
        ) from error
