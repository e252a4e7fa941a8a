"""TensorBoard: curves, pictures, and hyperparameters with the final metrics."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moa_train.runtime.files import writing
from moa_train.tracking.logger import Logger, Metrics
from moa_train.tracking.pictures import confusion_picture, image_grid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PREFIX = "events.out.tfevents."


GROUPS = {"loss": "loss", "images_per_second": "speed", "memory": "speed"}
"""Groups of cards. Other values are in ``optimization`` if they are of the training, else in ``accuracy``."""


class TensorBoard(Logger):
    """Write event files to ``tensorboard/`` in the run folder. The first event imports tensorboard and opens the file.

    Every group of cards answers one question: ``accuracy``, ``loss``, ``optimization``, ``speed``, and on request
    ``per_layer``. A name such as ``loss/train`` gives the group and the split or value. Final metrics are columns next
    to the settings in the tab HPARAMS, and nowhere else, because a single point is not a curve.

    TensorBoard hides the events of ``first_step`` and later steps that earlier sessions wrote, so no step appears
    twice.
    """

    def __init__(self, run_dir: Path, first_step: int, config: Mapping[str, Any]) -> None:
        self._folder = run_dir / "tensorboard"
        self._first_step = first_step
        self._config = config
        self._opened: _EventFile | None = None

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Write a point of each curve."""
        self._scalars(step, metrics, "train")

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Write a point of each curve, except for the test split if it is evaluated only at the end."""
        if split != "test" or self._config.get("engine", {}).get("eval_split") == "test":
            self._scalars(step, metrics, split)

    def log_images(self, step: int, images: Tensor, captions: Sequence[str] = (), name: str = "train/input") -> None:
        """Write one picture of up to 64 images with their captions."""
        self._image(step, name, image_grid(images, captions))

    def log_confusion(
        self, step: int, counts_KK: "NDArray[np.int64]", classes: Sequence[str], split: str = "val"
    ) -> None:
        """Write a picture of the confusion matrix."""
        self._image(step, f"{split}/confusion", confusion_picture(counts_KK, classes))

    def close(self, final: Metrics | None = None) -> None:
        """Write hyperparameters and final metrics, if there are any, and close the file."""
        if final:
            from torch.utils.tensorboard.summary import hparams

            # TensorBoard sorts the columns by name and shows the first five, so these names come before all settings.
            results = {f"(final) {name}": value for name, value in final.items() if _has_curve(name, value)}
            for summary in hparams(_flatten(results | dict(self._config)), {}):
                self._events.add(summary)
        if self._opened is not None:
            self._opened.close()

    def _image(self, step: int, name: str, picture: Tensor) -> None:
        from torch.utils.tensorboard.summary import image

        self._events.add(image(name, picture, dataformats="CHW"), step)

    @property
    def _events(self) -> "_EventFile":
        self._opened = self._opened or _EventFile(self._folder, self._first_step)
        return self._opened

    def _scalars(self, step: int, metrics: Metrics, split: str) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in metrics.items():
            if _has_curve(name, value):
                self._events.add(scalar(_tag(name, split), value), step)


def _has_curve(name: str, value: object) -> bool:
    """Return whether a value is worth a card: a number, but not one of images or hits, nor another form of the step."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and name not in ("epoch", "step") and not name.endswith(("_count", "total"))


def _tag(name: str, split: str) -> str:
    """Return the name of a curve, GROUP/NAME."""
    if "/" in name:
        return name
    group = GROUPS.get(name, "optimization" if split == "train" else "accuracy")
    if group == "accuracy":
        return f"accuracy/{split}_{name}"
    return f"loss/{split}" if group == "loss" else f"{group}/{name}"


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


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int | str | bool]:
    """Name nested values by dotted paths, and turn values that TensorBoard can't show into text."""
    flat: dict[str, float | int | str | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
