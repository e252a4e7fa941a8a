"""Distillation: targets from the recorded predictions of teachers, in real runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_train.assembly.inputs import build_train_loader, build_train_transform
from moa_train.cli.evaluate import evaluate
from moa_train.data.dataset import open_split
from moa_train.engine.distillation import Teachers
from moa_train.engine.predictions import Outcomes
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import EvalConfig

IMAGES = 30


def outcomes(classes: int, seed: int) -> tuple[Outcomes, np.ndarray]:
    """Return predictions that keep the top 5 classes, and all probabilities of the same predictions."""
    probabilities = np.random.default_rng(seed).dirichlet(np.full(classes, 0.1), IMAGES)
    top = np.argsort(-probabilities, axis=1)[:, :5]
    kept = np.log(np.take_along_axis(probabilities, top, 1) + 1e-30).astype(np.float32)
    nothing = np.zeros(IMAGES)
    names = np.array([f"c{number}" for number in range(classes)])
    outcome = Outcomes(nothing, nothing, nothing, top, kept, names, np.array([], np.bytes_), np.array("f"))
    return outcome, probabilities


def brute_force(probabilities: np.ndarray, index: list[int]) -> np.ndarray:
    """Return the five largest probabilities of each image in their places, and the mean of the others in theirs."""
    rows = []
    for row in probabilities[index]:
        order = np.argsort(-row)
        soft = row.copy()
        soft[order[5:]] = row[order[5:]].mean() if len(row) > 5 else 0
        rows.append(soft)
    return np.array(rows)


@pytest.mark.parametrize("classes", [2, 5, 6, 100])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_targets_blend_labels_with_the_mean_prediction_of_the_teachers(classes: int, weight: float) -> None:
    index = [7, 0, 29, 7]
    first, second = outcomes(classes, 1), outcomes(classes, 2)
    labels = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 0]), classes).float()
    targets = Teachers([first[0], second[0]], weight)(labels, torch.tensor(index))
    mean = (brute_force(first[1], index) + brute_force(second[1], index)) / 2
    np.testing.assert_allclose(targets, (1 - weight) * labels.numpy() + weight * mean, atol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-5)
    assert targets.dtype == torch.float32


def test_fingerprints_identify_predictions() -> None:
    first, second = (outcomes(10, seed)[0] for seed in (1, 2))
    fingerprints = [Teachers(teachers, 0.5).fingerprint for teachers in ([first], [second], [first, second])]
    assert len(set(fingerprints)) == 3
    assert Teachers([first], 0.9).fingerprint == fingerprints[0]


@pytest.fixture(scope="module")
def teacher(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has predicted its training images."""
    folder = shutil.copytree(straight, tmp_path_factory.mktemp("teacher") / "run", symlinks=True)
    evaluate(EvalConfig(ckpt=str(folder), split="train", device="cpu"), [])
    return folder


def test_a_teacher_predicts_the_images_that_it_was_trained_on(teacher, tiny) -> None:
    source = open_split(tiny().data, "train")
    predictions = Outcomes.read(teacher / "predictions-train.npz")
    assert predictions.labels.tolist() == source.labels.tolist()
    assert str(predictions.fingerprint) == source.fingerprint


def test_batches_get_the_targets_of_their_own_images(teacher, tiny) -> None:
    config = tiny({"augment.mixup": 0})
    source = open_split(config.data, "train")
    teachers = Teachers.open([str(teacher)], 1.0, source.classes, source.fingerprint)
    transform = build_train_transform(config, source, weak_from=100, teachers=teachers)
    batches = build_train_loader(config, source, Distributed(torch.device("cpu"))).batches()
    predictions = Outcomes.read(teacher / "predictions-train.npz")
    for step in range(4):
        batch = next(batches)
        _, targets = transform(batch, step)
        assert targets.argmax(1).tolist() == predictions.top[batch.index, 0].tolist()
        np.testing.assert_allclose(targets.amax(1).log(), predictions.top_log_probability[batch.index, 0], atol=1e-5)


def test_a_student_learns_from_its_teacher_and_resumes_exactly(teacher, train, outcome, tmp_path) -> None:
    settings = {"distill.teachers": [str(teacher)], "distill.weight": 0.9}
    whole, parts, alone = (tmp_path / name for name in ("whole", "parts", "alone"))
    assert train(whole, **settings) == 0
    assert train(alone) == 0
    assert train(parts, **settings, engine__stop_after="5 steps") == 0
    assert train(parts, resume=True) == 0
    assert outcome(whole)["tensors"] == outcome(parts)["tensors"]
    assert outcome(whole)["tensors"] != outcome(alone)["tensors"]


def test_a_resume_with_other_predictions_is_refused(teacher, straight, train, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    output = str(other / "eval-train.json")
    evaluate(EvalConfig(ckpt=str(straight), weights="model", split="train", device="cpu", output=output), [])
    run_dir = tmp_path / "run"
    assert train(run_dir, **{"distill.teachers": [str(teacher)]}, engine__stop_after="5 steps") == 0
    with pytest.raises(UserError, match=r"teachers' predictions are not those of the checkpoint"):
        train(run_dir, resume=True, **{"distill.teachers": [str(other)]})
    moved = shutil.copytree(teacher, tmp_path / "moved", symlinks=True)
    assert train(run_dir, resume=True, **{"distill.teachers": [str(moved)]}) == 0


def test_errors_come_before_training(teacher, straight, train, tmp_path) -> None:
    with pytest.raises(UserError, match=r"(?s)predictions-train.npz does not exist.*moa-eval ckpt=.* split=train"):
        train(tmp_path / "a", **{"distill.teachers": [str(straight)]})
    with pytest.raises(UserError, match=r"predictions for other training images.*data.val_fraction"):
        train(tmp_path / "b", **{"distill.teachers": [str(teacher)], "data.val_fraction": 0.3})
    assert not list(tmp_path.glob("*/checkpoints/*"))
