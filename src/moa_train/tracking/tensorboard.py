"""TensorBoard: scalars, samples of the input, and hyperparameters with the final metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moa_train.tracking.events import EventFile
from moa_train.tracking.writers import Metrics, Writer


class TensorBoard(Writer):
    """Writes event files to ``folder``. Nothing is imported or opened before the first event.

    Events of ``first_step`` and later from before a resume are hidden by TensorBoard, so steps stay
    monotonic. ``hyperparameters``, nested or flat, are written with the final metrics.
    """

    def __init__(self, folder: Path, first_step: int = 0, hyperparameters: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._first_step = first_step
        self._hyperparameters = dict(_flat(hyperparameters or {}))
        self._opened: EventFile | None = None

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Write ``train/<name>`` for each number."""
        self._scalars("train", step, metrics)

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Write ``<split>/<name>`` for each number."""
        self._scalars(split, step, metrics)

    def log_images(self, step: int, images: Tensor) -> None:
        """Write one picture of up to 64 images."""
        from torch.utils.tensorboard.summary import image

        self._events.add(image("train/input", image_grid(images), dataformats="CHW"), step)

    def close(self, final: Metrics | None = None) -> None:
        """Write hyperparameters and final metrics, if there are any, and close the file."""
        if final:
            from torch.utils.tensorboard.summary import hparams

            numbers = {f"final/{name}": value for name, value in _numbers(final)}
            for summary in hparams(self._hyperparameters, numbers):
                self._events.add(summary)
            self._scalars("final", 0, final)
        if self._opened is not None:
            self._opened.close()

    @property
    def _events(self) -> EventFile:
        self._opened = self._opened or EventFile(self.folder, self._first_step)
        return self._opened

    def _scalars(self, prefix: str, step: int, metrics: Metrics) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in _numbers(metrics):
            self._events.add(scalar(f"{prefix}/{name}", value), step)


def image_grid(images: Tensor, columns: int = 8, rows: int = 8, gap: int = 2) -> Tensor:
    """Arrange images (uint8, B C H W) row by row in one picture (uint8, C, height, width) on white."""
    images = images[: columns * rows].detach().cpu()
    count = len(images)
    columns = min(columns, count)
    empty = -count % columns
    x_BCHW = pad(torch.cat([images, images.new_full((empty, *images.shape[1:]), 255)]), (0, gap, 0, gap), value=255)
    _, channels, height, width = x_BCHW.shape
    x_RKCHW = x_BCHW.reshape(-1, columns, channels, height, width)
    grid = x_RKCHW.permute(2, 0, 3, 1, 4).reshape(channels, -1, columns * width)
    return pad(grid, (gap, 0, gap, 0), value=255)


def _numbers(metrics: Metrics) -> list[tuple[str, float]]:
    return [(name, float(v)) for name, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float | int | str | bool]]:
    """Name nested values by dotted paths; what TensorBoard cannot show is turned into text."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)))
    return pairs
