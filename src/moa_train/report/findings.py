"""The findings of an evaluation: accuracy in total and by class, confusions, mistakes, calibration, label errors."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moa_train.data.source import Source
from moa_train.engine.metrics import has_probabilities, rank_of_label
from moa_train.engine.predictions import TOP, Predictions, log_probabilities
from moa_train.report import intervals
from moa_train.report.calibration import Calibration
from moa_train.report.intervals import Interval
from moa_train.report.label_errors import label_errors

SHOWN = 48
"""Number of images in each list of mistakes."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ClassFindings:
    """One class.

    Attributes:
        name: of the class.
        images: number of images with this label.
        accuracy: share of them that are classified correctly, in percent.
        predicted: number of images that are classified as this class.
        precision: share of those that have this label, in percent; None if there are none.
        confidence: mean probability of the predicted class over the images with this label, in percent.
        confused_with: the most frequent wrong prediction, if any.
        confusions: how often it occurs.
    """

    name: str
    images: int
    accuracy: Interval
    predicted: int
    precision: Interval | None
    confidence: float
    confused_with: str | None
    confusions: int


class Findings:
    """Everything that a report says about predictions. Images are referred to by their row in the split.

    Args:
        predictions: of every image of the split.
        source: the split.
        trained_on: whether the model was trained on these images.
    """

    def __init__(self, predictions: Predictions, source: Source, *, trained_on: bool) -> None:
        self.classes, self.trained_on = list(source.classes), trained_on
        self._files, self._source = source.files, source
        self.labels = predictions.labels
        logits = torch.from_numpy(predictions.logits)
        self.rank = rank_of_label(logits, torch.from_numpy(self.labels)).numpy()
        self.finite: NDArray[np.bool_] = has_probabilities(logits).numpy()  # others count as wrong
        self.logits = np.where(self.finite[:, None], predictions.logits, 0).astype(np.float32)
        self.log_probabilities = log_probabilities(torch.from_numpy(self.logits)).numpy()
        self.predicted: Rows = self.logits.argmax(1)
        self.wrong: NDArray[np.bool_] = (self.rank > 0) & self.finite
        self.probability = np.exp(self.log_probabilities.max(1))
        self.own_probability = np.exp(np.take_along_axis(self.log_probabilities, self.labels[:, None], 1)[:, 0])

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, row: int) -> str:
        """Return the path of an image relative to the folder of its split, or its number if it has no file."""
        if self._files is not None:
            return os.fsdecode(bytes(self._files[row]))
        return self._source.name(row)

    @cached_property
    def top(self) -> dict[str, Interval]:
        """Top-1 and top-5 accuracy in percent."""
        counts = {1: int((self.rank < 1).sum()), TOP: int((self.rank < TOP).sum())}
        return {f"top{k}": intervals.share(hits, len(self)) for k, hits in counts.items()}

    @cached_property
    def loss(self) -> Interval:
        """Mean cross-entropy of the images with probabilities."""
        losses = -np.take_along_axis(self.log_probabilities, self.labels[:, None], 1)[self.finite, 0]
        return intervals.mean(losses)

    @cached_property
    def confusion(self) -> dict[tuple[int, int], int]:
        """Number of images by (label, predicted class), without zeros."""
        pairs = self.labels[self.finite] * len(self.classes) + self.predicted[self.finite]
        values, counts = np.unique(pairs, return_counts=True)
        cells = zip(*np.divmod(values, len(self.classes)), counts, strict=True)
        return {(int(label), int(predicted)): int(count) for label, predicted, count in cells}

    @cached_property
    def worst_pairs(self) -> list[tuple[int, int]]:
        """Confused pairs (label, predicted class), the most frequent first."""
        pairs = (pair for pair in self.confusion if pair[0] != pair[1])
        return sorted(pairs, key=lambda pair: (-self.confusion[pair], pair))

    @cached_property
    def by_class(self) -> list[ClassFindings]:
        """The classes that have images, in the order of the logits."""
        count = len(self.classes)
        images = np.bincount(self.labels, minlength=count)
        hits = np.bincount(self.labels[self.rank < 1], minlength=count)
        predicted = np.bincount(self.predicted[self.finite], minlength=count)
        labels = self.labels[self.finite]
        confidence = np.bincount(labels, self.probability[self.finite], count)
        counted = np.bincount(labels, minlength=count)
        worst: dict[int, tuple[int, int]] = {}
        for label, wrong in self.worst_pairs:
            worst.setdefault(label, (wrong, self.confusion[label, wrong]))
        return [
            ClassFindings(
                name=self.classes[label],
                images=int(images[label]),
                accuracy=intervals.share(int(hits[label]), int(images[label])),
                predicted=int(predicted[label]),
                precision=intervals.share(int(hits[label]), int(predicted[label])) if predicted[label] else None,
                confidence=100 * float(confidence[label]) / max(int(counted[label]), 1),
                confused_with=self.classes[worst[int(label)][0]] if int(label) in worst else None,
                confusions=worst[int(label)][1] if int(label) in worst else 0,
            )
            for label in np.flatnonzero(images)
        ]

    @cached_property
    def confident_wrong(self) -> Rows:
        """The wrong predictions with the highest probability."""
        rows = np.flatnonzero(self.wrong)
        return rows[np.argsort(-self.probability[rows], kind="stable")][:SHOWN]

    @cached_property
    def uncertain_right(self) -> Rows:
        """The right predictions with the lowest probability."""
        rows = np.flatnonzero(self.rank < 1)
        return rows[np.argsort(self.probability[rows], kind="stable")][:SHOWN]

    @cached_property
    def label_errors(self) -> Rows | None:
        """The images whose label is probably wrong; None if the model was trained on them."""
        if self.trained_on:
            return None
        present = np.unique(self.labels[self.finite])
        if len(present) < 2:
            return np.array([], np.int64)
        rows = np.flatnonzero(self.finite)
        logits = torch.from_numpy(self.logits[rows][:, present]).double().clamp(min=-1e30)  # not all minus infinity
        labels = np.searchsorted(present, self.labels[rows])
        return rows[label_errors(logits.softmax(1).numpy(), labels)]

    @cached_property
    def calibration(self) -> Calibration | None:
        """Calibration of the images with probabilities; None if there are none."""
        if not self.finite.any():
            return None
        return Calibration.of(self.logits[self.finite], self.labels[self.finite])

    def cells(self, most: int) -> dict[tuple[int, int], Rows]:
        """Return up to ``most`` images of each cell of the confusion matrix: the most confident wrong ones, and on the
        diagonal the least certain ones.
        """
        rows: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for row in np.argsort(-self.probability, kind="stable"):
            if self.finite[row]:
                rows[int(self.labels[row]), int(self.predicted[row])].append(int(row))
        return {
            pair: np.array(found[::-1][:most] if pair[0] == pair[1] else found[:most]) for pair, found in rows.items()
        }

    def notes(self) -> Iterator[str]:
        """Yield what limits the findings."""
        if self.trained_on:
            yield "The model was trained on these images, so all numbers are better than on new images."
        if bad := int((~self.finite).sum()):
            yield (
                f"{bad:,} images have no probabilities, because a logit is NaN or infinity. They count as wrong in all "
                "accuracies, and everything else leaves them out."
            )
        absent = len(self.classes) - len(self.by_class)
        if absent:
            yield f"{absent} of the {len(self.classes)} classes have no images here. They can still be predicted."

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as JSON."""
        errors = self.label_errors
        return {
            "total": len(self),
            **{
                name: {**interval.as_dict(), "count": int((self.rank < int(name[3:])).sum())}
                for name, interval in self.top.items()
            },
            "loss": self.loss.as_dict(),
            "notes": list(self.notes()),
            "classes": [asdict(found) for found in self.by_class],
            "confusion": [
                {"label": self.classes[label], "predicted": self.classes[predicted], "images": count}
                for (label, predicted), count in self.confusion.items()
            ],
            "confident_wrong": self.describe(self.confident_wrong),
            "uncertain_right": self.describe(self.uncertain_right),
            "label_errors": None if errors is None else {"count": len(errors), "first": self.describe(errors[:SHOWN])},
            "calibration": None if self.calibration is None else self.calibration.as_dict(),
        }

    def describe(self, rows: Sequence[int] | Rows) -> list[dict[str, Any]]:
        """Return images as JSON."""
        return [
            {
                "index": int(row),
                "file": self.file(int(row)),
                "label": self.classes[self.labels[row]],
                "predicted": self.classes[self.predicted[row]],
                "probability": float(self.probability[row]),
                "label_probability": float(self.own_probability[row]),
            }
            for row in rows
        ]
