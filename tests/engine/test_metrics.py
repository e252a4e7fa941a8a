"""Metrics and losses by name and by import path; the metric that chooses the best checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.metrics import create_metrics
from moa_train.runtime.errors import UserError
from moa_train.schema import EngineConfig
from moa_train.tracking.jsonl import read_rows


@pytest.fixture(autouse=True)
def own_parts_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def evaluations(run_dir: Path) -> dict[int, dict]:
    return {row["step"]: row for row in read_rows(run_dir / "metrics.jsonl") if row.get("split") == "val"}


@pytest.mark.parametrize("metric", ["top1", "loss"])
def test_the_best_checkpoint_has_the_best_value_of_the_chosen_metric(train, tmp_path, metric):
    run_dir = tmp_path / "run"
    assert train(run_dir, engine__best_by=metric, engine__eval_every="1 step", optim__lr=0.1, engine__keep_last=1) == 0
    values = {step: row[metric] for step, row in evaluations(run_dir).items()}
    assert len(values) == 12
    best = (max if metric == "top1" else min)(values, key=values.get)  # the earliest of equal ones
    assert best < 12  # the last checkpoint is not the best one
    checkpoint = CheckpointStore(run_dir).best()
    assert checkpoint.step == best
    assert checkpoint.score == (values[best] if metric == "top1" else -values[best])
    newest = CheckpointStore(run_dir).newest()
    assert newest.state["train"]["best"][metric] == values[best]
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["step"], result["val"][metric]) == (best, values[best])


def test_a_metric_of_your_own_is_logged_and_chooses_the_best(train, tmp_path, capsys):
    own = {
        "engine__metrics": "[loss,'own_parts:Recall']",
        "engine__best_by": "Recall",
        "engine__args__Recall__classes": 10,
    }
    assert train(tmp_path / "run", **own) == 0
    rows = evaluations(tmp_path / "run")
    assert {"loss", "Recall"} <= rows[4].keys()
    assert "top1" not in rows[4]
    assert CheckpointStore(tmp_path / "run").best().score == max(row["Recall"] for row in rows.values())
    assert "Recall on val" in capsys.readouterr().out
    assert "Recall" in json.loads((tmp_path / "run" / "result.json").read_text())["test"]


def test_settings_of_a_metric_are_checked():
    def create(args: dict) -> object:
        return create_metrics(EngineConfig(metrics=["own_parts:Recall"], args={"Recall": args}))["Recall"]

    assert create({"classes": 3}).classes == 3
    with pytest.raises(UserError, match=r"Missing engine\.args\.Recall\.classes"):
        create({})
    with pytest.raises(UserError, match=r"Unknown key engine\.args\.Recall\.class\. Did you mean 'classes'"):
        create({"class": 3})


def test_a_mean_over_classes_needs_the_sums_of_all_ranks():
    metric = create_metrics(EngineConfig(metrics=["own_parts:Recall"], args={"Recall": {"classes": 2}}))["Recall"]
    logits, labels = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]]), torch.tensor([0, 0, 0, 1])
    parts = [metric.count(logits[part], labels[part]) for part in (slice(2), slice(2, 4))]
    assert metric.value(sum(parts), 4) == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_a_loss_of_your_own_trains_with_its_settings(straight, train, tmp_path):
    """With gamma 0 the focal loss is the cross-entropy, with 2 it is smaller."""
    losses = {}
    for gamma in (0, 2):
        run_dir = tmp_path / f"gamma{gamma}"
        assert train(run_dir, loss__name="own_parts:focal", loss__args__gamma=gamma) == 0
        losses[gamma] = [row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"]
    expected = [row["loss"] for row in read_rows(straight / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert all(focal < 0.95 * plain for focal, plain in zip(losses[2], expected, strict=True))
