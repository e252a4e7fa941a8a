"""Findings: counted from logits that are small enough to count by hand."""

import json

import numpy as np
import pytest

from moa_train.data.array_source import ArraySource
from moa_train.engine.predictions import Predictions
from moa_train.report.findings import Findings

LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 1, 1, 1, 2, 2])
CONFIDENCE = np.array([2.0, 3.0, 1.0, 5.0, 4.0, 0.5])


def findings(*, trained_on: bool = False, **changed: object) -> Findings:
    """Return findings, with ``rowN`` as the logits of image N."""
    logits = np.zeros((6, 4), np.float32)
    logits[np.arange(6), PREDICTED] = CONFIDENCE
    for name, row in changed.items():
        logits[int(name[3:])] = row
    files = np.array([f"class/{row}.png".encode() for row in range(6)])
    images = np.zeros((6, 3, 4, 4), np.uint8)
    source = ArraySource("set/test", images, LABELS, ["a", "b", "c", "unused"], (4, 4), files=files)
    return Findings(Predictions(LABELS, logits), source, trained_on=trained_on)


def test_counts_confusions_and_order():
    found = findings()
    assert found.confusion == {(0, 0): 1, (0, 1): 2, (1, 1): 1, (1, 2): 1, (2, 2): 1}
    assert found.worst_pairs == [(0, 1), (1, 2)]
    assert found.confident_wrong.tolist() == [4, 1, 2]
    assert found.uncertain_right.tolist() == [5, 0, 3]
    assert found.top["top1"].value == 50
    first, second, third = found.by_class
    assert (first.images, first.accuracy.value, first.predicted, first.confused_with, first.confusions) == (
        3, pytest.approx(100 / 3), 1, "b", 2,
    )  # fmt: skip
    assert second.precision.value == pytest.approx(100 / 3)
    assert third.confused_with is None
    assert [rows.tolist() for rows in found.cells(1).values()] == [[3], [4], [1], [0], [5]]


def test_the_json_names_files_and_classes():
    found = json.loads(json.dumps(findings().as_dict()))
    worst = found["confident_wrong"][0]
    assert (worst["index"], worst["file"], worst["label"], worst["predicted"]) == (4, "class/4.png", "b", "c")
    assert worst["probability"] == pytest.approx(np.exp(4) / (np.exp(4) + 3))
    assert {"label": "a", "predicted": "b", "images": 2} in found["confusion"]
    assert found["top1"]["count"] == 3
    assert found["notes"] == ["1 of the 4 classes have no images here. They can still be predicted."]


def test_images_of_the_training_split_have_no_label_errors():
    assert findings(trained_on=True).as_dict()["label_errors"] is None
    assert "trained on these images" in next(findings(trained_on=True).notes())


@pytest.mark.parametrize("row3", [np.nan, [0, np.inf, 0, 0], [0, 9, np.nan, 0], -np.inf])
def test_images_without_probabilities_count_as_wrong_and_are_reported(row3):
    """Without the infinity or NaN, image 3 would be the only hit of class b."""
    found = findings(row3=row3)
    assert found.top["top1"].value == pytest.approx(100 * 2 / 6)
    assert found.top["top5"].value == pytest.approx(100 * 5 / 6), "a hit even of four classes"
    assert (1, 1) not in found.confusion
    assert 3 not in [*found.uncertain_right, *found.confident_wrong]
    second = found.by_class[1]
    assert (second.accuracy.value, second.predicted, second.precision.value) == (0, 2, 0)
    assert second.confidence == pytest.approx(100 * np.exp(4) / (np.exp(4) + 3)), "that of image 4 alone"
    assert "1 images have no probabilities" in next(found.notes())
    assert np.isfinite(found.loss.value)
    json.dumps(found.as_dict(), allow_nan=False)


def test_masked_classes_have_a_probability_of_0():
    """The mask of image 3 leaves a hit. That of image 4 leaves two wrong classes, and makes the loss infinite."""
    found = findings(row3=[-np.inf, 5, -np.inf, -np.inf], row4=[0, -np.inf, 4, -np.inf])
    assert found.top == findings().top
    assert found.confusion == findings().confusion
    assert found.probability[3] == 1
    assert found.loss.value == np.inf
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (written["loss"]["value"], written["calibration"]["before"]["loss"]) == (None, None)


def test_findings_without_any_probabilities_are_valid_json():
    rows = {f"row{row}": np.nan for row in range(6)}
    written = json.loads(json.dumps(findings(**rows).as_dict(), allow_nan=False))
    assert (written["top1"]["count"], written["loss"]["value"], written["confusion"]) == (0, None, [])
