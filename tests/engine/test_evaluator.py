"""Metrics compared with scikit-learn's; two_ranks.py computes them in one process and on two gloo ranks."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, top_k_accuracy_score

from moa_train.data.array_source import ArraySource
from moa_train.data.loader import EvalLoader
from moa_train.engine.evaluator import Evaluation, evaluate
from moa_train.engine.metrics import NO_RANK, Top1, Top5, create_metrics, rank_of_label
from moa_train.runtime.distributed import Distributed
from moa_train.schema import EngineConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("logits", "label", "rank"),
    [
        ([3.0, 2.0, 1.0], 0, 0),
        ([3.0, 2.0, 1.0], 2, 2),
        ([1.0, 1.0, 1.0], 0, 0),  # ties go to the lower class
        ([1.0, 1.0, 1.0], 1, 1),
        ([1.0, 1.0, 1.0], 2, 2),
        ([0.0, 2.0, 2.0], 2, 1),
        ([-INF, -INF, 0.0], 1, 2),
        ([0.0, -INF, -INF], 0, 0),  # masked classes
        ([INF, 0.0, INF], 0, NO_RANK),
        ([NAN, 2.0, 1.0], 1, NO_RANK),
        ([2.0, 1.0, NAN], 0, NO_RANK),
        ([NAN, NAN, NAN], 1, NO_RANK),
        ([-INF, -INF, -INF], 0, NO_RANK),
    ],
)
def test_rank_of_a_label(logits, label, rank):
    found = rank_of_label(torch.tensor([logits]), torch.tensor([label]))
    assert (found.tolist(), found.dtype) == ([rank], torch.int64)
    hits = [int(metric.count(torch.tensor([logits]), torch.tensor([label]))) for metric in (Top1(), Top5())]
    assert hits == [rank == 0, rank != NO_RANK], "of three classes, all are among the first five"


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_rank_is_the_position_in_a_stable_sort(levels):
    rng = np.random.default_rng(0)
    logits, labels = rng.integers(0, levels, (200, 17)), rng.integers(0, 17, 200)
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = [int(np.flatnonzero(row == label)[0]) for row, label in zip(order, labels, strict=True)]
    found = rank_of_label(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    assert found.tolist() == expected


@pytest.fixture(scope="module")
def counted(two_ranks) -> dict[str, dict]:
    places = ("1-0", "2-0", "2-1")
    return {place: json.loads((two_ranks / f"engine-{place}.json").read_text())["evaluate"] for place in places}


def test_metrics_are_those_of_scikit_learn(counted):
    alone = counted["1-0"]
    logits, labels = np.array(alone["logits"]), np.array(alone["labels"])
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    result = alone["8 0"]
    assert result["total"] == len(labels) == 61
    assert result["top1_count"] == accuracy_score(labels, logits.argmax(1), normalize=False)
    assert result["top5_count"] == top_k_accuracy_score(labels, logits, k=5, normalize=False, labels=range(10))
    assert result["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(10)), rel=1e-6)
    assert result["top1"] == 100 * result["top1_count"] / 61
    assert result["Recall"] == pytest.approx(100 * balanced_accuracy_score(labels, logits.argmax(1)), rel=1e-6)
    assert result["Recall"] != pytest.approx(result["top1"], rel=1e-3)
    assert 0 < result["top1_count"] < result["top5_count"] < 61  # the test can fail


def test_counts_are_the_same_for_any_ranks_batches_and_workers(counted):
    results = {
        (place, batch): result
        for place, found in counted.items()
        for batch, result in found.items()
        if batch not in ("logits", "labels")
    }
    assert len(results) == 18
    counts = {
        tuple(result[key] for key in ("top1_count", "top5_count", "Recall", "total")) for result in results.values()
    }
    assert len(counts) == 1
    losses = [result["loss"] for result in results.values()]
    assert max(losses) == pytest.approx(min(losses), rel=1e-6)
    assert all(counted["2-0"][batch] == counted["2-1"][batch] for batch in counted["2-0"])  # to the last bit


def source(images: int = 5) -> ArraySource:
    pixels = np.arange(images, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    return ArraySource("t/test", pixels, np.zeros(images, np.int64), ["a", "b"], (1, 1))


class Leaning(torch.nn.Module):
    """Predicts class 0 for images below 3."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return torch.stack([3 - images.mean((1, 2, 3)), images.mean((1, 2, 3)) - 3], dim=1)


def run(stop=lambda: False, model: torch.nn.Module | None = None, **more) -> Evaluation | None:
    model = model or Leaning()
    with Distributed.start("cpu", 60.0) as alone:
        return evaluate(
            model,
            EvalLoader(source(), batch_size=2),
            lambda batch: batch.images.float(),
            metrics=create_metrics(EngineConfig()),
            autocast=nullcontext,
            distributed=alone,
            stop=stop,
            **more,
        )


def test_few_classes_and_an_incomplete_batch():
    result = run()
    assert result is not None
    assert (result.counts, result.total) == ({"top1": 4, "top5": 5}, 5)  # image 3 is a tie, which goes to class 0
    assert (result.values["top1"], result.values["top5"]) == (80.0, 100.0)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_gets_its_mode_back(training):
    model = Leaning().train(training)
    run(model=model)
    assert model.training == training
    failing = torch.nn.Linear(7, 1).train(training)
    with pytest.raises(RuntimeError):
        run(model=failing)
    assert failing.training == training


def test_a_stop_ends_an_evaluation_without_a_result():
    calls = iter([False, True])
    assert run(stop=lambda: next(calls)) is None
    assert next(calls, "used up") == "used up"


def test_it_reports_its_progress():
    reported = []
    run(advance=lambda *numbers: reported.append(numbers))
    assert reported == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["top1", "top5", "loss"])
def test_without_samples_a_metric_is_zero(name):
    (metric,) = create_metrics(EngineConfig(metrics=[name])).values()
    assert metric.value(torch.zeros((), dtype=torch.int64), 0) == 0
