"""TensorBoard: scalars, a sample of the input, and hyperparameters with the final metrics."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moa_train.runtime.files import writing
from moa_train.tracking.logger import Logger, Metrics, numbers

_PREFIX = "events.out.tfevents."


class TensorBoard(Logger):
    """Write event files to ``tensorboard/`` in the run folder. The first event imports tensorboard and opens the file.

    TensorBoard hides the events of ``first_step`` and later steps that earlier sessions wrote, so no step appears
    twice. The configuration is written with the final metrics, as hyperparameters.
    """

    def __init__(self, run_dir: Path, first_step: int, config: Mapping[str, Any]) -> None:
        self._folder = run_dir / "tensorboard"
        self._first_step = first_step
        self._config = config
        self._opened: _EventFile | None = None

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Write ``train/NAME`` for each number."""
        self._scalars(step, numbers("train", metrics))

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Write ``SPLIT/NAME`` for each number."""
        self._scalars(step, numbers(split, metrics))

    def log_images(self, step: int, images: Tensor) -> None:
        """Write one picture of up to 64 images."""
        from torch.utils.tensorboard.summary import image

        self._events.add(image("train/input", image_grid(images), dataformats="CHW"), step)

    def close(self, final: Metrics | None = None) -> None:
        """Write hyperparameters and final metrics, if there are any, and close the file."""
        if final:
            from torch.utils.tensorboard.summary import hparams

            values = numbers("final", final)
            for summary in hparams(_flatten(self._config), values):
                self._events.add(summary)
            self._scalars(0, values)
        if self._opened is not None:
            self._opened.close()

    @property
    def _events(self) -> "_EventFile":
        self._opened = self._opened or _EventFile(self._folder, self._first_step)
        return self._opened

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._events.add(scalar(name, value), step)


class _EventFile:
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


def image_grid(images: Tensor) -> Tensor:
    """Arrange up to 64 images (uint8, B C H W) in rows of 8 on white, 2 pixels apart; return uint8, C height width."""
    images, gap = images[:64].detach().cpu(), 2
    columns = min(8, len(images))
    empty = -len(images) % columns
    x_BCHW = pad(torch.cat([images, images.new_full((empty, *images.shape[1:]), 255)]), (0, gap, 0, gap), value=255)
    _, channels, height, width = x_BCHW.shape
    x_RKCHW = x_BCHW.reshape(-1, columns, channels, height, width)
    grid = x_RKCHW.permute(2, 0, 3, 1, 4).reshape(channels, -1, columns * width)
    return pad(grid, (gap, 0, gap, 0), value=255)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int | str | bool]:
    """Name nested values by dotted paths, and turn values that TensorBoard can't show into text."""
    flat: dict[str, float | int | str | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
