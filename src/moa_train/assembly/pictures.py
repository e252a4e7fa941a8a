"""The images that a run logs: augmented inputs, and the mistakes of an evaluation."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_train.data.array_source import ArraySource
from moa_train.data.augment import Normalize
from moa_train.data.order import Draw
from moa_train.data.source import Source
from moa_train.data.view import CenterCrop
from moa_train.engine.mistakes import Mistakes
from moa_train.engine.step import TrainStep
from moa_train.schema import RunConfig
from moa_train.tracking.tracker import Tracker


def read_images(source: Source, rows: Sequence[int] | NDArray[np.int64], crop_ratio: float) -> Tensor:
    """Return the pixels that the model receives, uint8, (B, 3, H, W)."""
    index = np.asarray(rows, np.int64)
    if isinstance(source, ArraySource):
        return source.gather(index)
    view, zero = CenterCrop(source.image_size, crop_ratio), np.zeros(1, np.int64)

    def one(row: int) -> Tensor:
        return source.read(Draw(zero, np.array([row]), zero), 0, view, substitute=False)[0]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return torch.cat(list(pool.map(one, index)))


def show_inputs(train_step: TrainStep, tracker: Tracker, config: RunConfig, classes: list[str]) -> None:
    """Log some augmented images of the first batch, with their mixed labels."""
    normalize, shown = Normalize.of(config.data), config.tracking.images

    def show(images: Tensor, targets: Tensor) -> None:
        captions = [mixed_label(target, classes) for target in targets[:shown].cpu()]
        tracker.log_images(0, normalize.undo(images[:shown]), captions)

    train_step.on_inputs = show


def mixed_label(target_K: Tensor, classes: list[str]) -> str:
    """Describe a target distribution by its one or two classes above the part that label smoothing spreads evenly."""
    top = target_K.topk(min(2, len(classes)))
    floor = 1.5 * float(target_K.min()) + 0.005
    pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return "\n".join(f"{classes[index]}: {100 * weight:.0f}%" for weight, index in pairs if weight > floor)


def show_mistakes(config: RunConfig, source: Source, found: Mistakes, step: int, tracker: Tracker) -> None:
    """Log the confusion matrix and the most confident mistakes of an evaluation."""
    split, classes = source.title.rpartition("/")[2], source.classes
    if found.confusion is not None:
        tracker.log_confusion(step, found.confusion, classes, split)
    if not len(found.index):
        return
    images = read_images(source, found.index, config.data.eval_crop)
    captions = [
        f"true: {classes[label]}\n{classes[predicted]}: {100 * probability:.0f}%\n{Path(source.name(index)).name}"
        for index, label, predicted, probability in zip(
            found.index, found.labels, found.predicted, found.probability, strict=True
        )
    ]
    tracker.log_images(step, images, captions, f"{split}/mistakes")
