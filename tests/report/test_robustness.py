"""Robustness: masks, clean controls and mean corruption errors, and the command from beginning to end."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.cli.evaluate import evaluate
from moa_train.engine.predictions import Predictions
from moa_train.report.robustness import Control, errors_by_corruption, relative_to
from moa_train.report.shifts import ALEXNET
from moa_train.runtime.errors import UserError
from moa_train.schema import EvalConfig


def predictions(labels: list[int], logits: list[list[float]]) -> Predictions:
    return Predictions(np.array(labels), np.array(logits, np.float32))


def test_the_model_chooses_among_the_classes_of_the_test_set():
    """Class 1 has the largest logit everywhere, but does not occur in the subset."""
    subset = predictions([0, 2, 2], [[1, 9, 0], [0, 9, 1], [1, 9, 0]])
    clean = predictions([0, 1, 2, 0], [[1, 9, 0], [0, 9, 0], [0, 9, 1], [0, 9, 1]])
    found = Control(clean).compare(subset, "imagenet-a", "", 0)
    assert found["top1"]["value"] == pytest.approx(200 / 3)
    assert found["clean"]["value"] == pytest.approx(200 / 3)  # without the image of class 1
    assert (found["images"], found["classes"]) == (3, 2)
    assert Control(clean).accuracy().value == 25


def test_real_labels_allow_several_classes_and_omit_images_without_one():
    clean = predictions([0, 1, 2], [[9, 0, 0], [9, 0, 0], [9, 0, 0]])
    found = Control(clean).real([[1, 0], [1], []])
    assert (found["images"], found["top1"]["value"], found["clean"]["value"]) == (2, 50, 50)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_images_without_probabilities_count_as_wrong(bad):
    """numpy's argmax is the class whose logit is NaN or infinity, here the label."""
    clean = predictions([0, 1], [[bad, 0, 0], [0, 9, -np.inf]])
    assert Control(clean).accuracy().value == 50
    assert Control(clean).accuracy(np.array([0, 1])).value == 50
    assert Control(clean).real([[0], [1]])["top1"]["value"] == 50


def results(errors: dict[str, float], benchmark: str = "imagenet-c", severities: int = 5) -> list[dict]:
    return [
        {
            "benchmark": benchmark,
            "variant": name,
            "severity": severity,
            "classes": 1000,
            "top1": {"value": 100 - error - severity + 3},
        }
        for name, error in errors.items()
        for severity in range(1, severities + 1)
    ]


def test_the_mean_corruption_error_is_relative_to_alexnet():
    """AlexNet's own errors, with a spread over the severities, have an mCE of 100%; half of them, 50%."""
    alexnet = {name: 100 * error for name, error in ALEXNET.items()}
    assert errors_by_corruption(results(alexnet), 1000)["imagenet-c"]["mce"] == pytest.approx(100)
    half = results({name: error / 2 for name, error in alexnet.items()} | {"spatter": 90})
    found = errors_by_corruption(half, 1000)["imagenet-c"]
    assert found["mce"] == pytest.approx(50)
    assert found["mean"] == pytest.approx(np.mean(list(alexnet.values())) / 2)  # spatter does not count


@pytest.mark.parametrize("case", ["a corruption is missing", "a severity is missing", "fewer classes", "CIFAR"])
def test_an_incomplete_mean_corruption_error_is_left_out(case):
    alexnet = {name: 100 * error for name, error in ALEXNET.items()}
    if case == "a corruption is missing":
        del alexnet["fog"]
    found = results(alexnet, "cifar-10-c" if case == "CIFAR" else "imagenet-c", 4 if "severity" in case else 5)
    summary = errors_by_corruption(found, 100 if case == "fewer classes" else 1000)
    assert not any("mce" in one for one in summary.values())


def test_errors_relative_to_another_model():
    summary = errors_by_corruption(results({"fog": 30, "snow": 20}, "cifar-10-c"), 10)
    other = errors_by_corruption(results({"fog": 60, "snow": 10}, "cifar-10-c"), 10)
    assert relative_to(summary, other) == {"cifar-10-c": pytest.approx(125)}
    extra = errors_by_corruption(results({"fog": 30, "snow": 20, "spatter": 90}, "cifar-10-c"), 10)
    assert relative_to(extra, other) == {"cifar-10-c": pytest.approx(125)}, "spatter does not count"
    with pytest.raises(UserError, match="same corruptions"):
        relative_to(summary, {})


def run(**options) -> dict:
    out = io.StringIO()
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out):
            evaluate(EvalConfig(device="cpu", **{key: _plain(value) for key, value in options.items()}), [])
    finally:
        torch.set_deterministic_debug_mode("default")
        torch.set_num_threads(threads)
    return json.loads(out.getvalue())


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def test_corruptions_of_the_test_images_from_the_command(straight, tmp_path):
    first = run(ckpt=straight, robustness=["corruptions"], output=tmp_path / "one.json")
    logged = json.loads((straight / "result.json").read_text())["test"]
    assert first["clean"]["value"] == logged["top1"]
    assert len(first["results"]) == 25
    again = run(
        ckpt=straight, robustness=["all"], output=tmp_path / "two.json", batch_size=50, reference=tmp_path / "one.json",
        benchmarks=tmp_path,
    )  # fmt: skip
    assert again["results"] == first["results"]
    assert again["relative"] == {"corruptions": pytest.approx(100)}
    assert {"imagenet-v2", "cifar-10-c", "imagenet-real"} <= set(again["skipped"])
    other = first | {"mean_corruption_error": {"cifar-10-c": first["mean_corruption_error"]["corruptions"]}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="was not evaluated on the same corruptions"):
        run(ckpt=straight, robustness=["corruptions"], output=tmp_path / "kept.json", reference=tmp_path / "other.json")
    assert json.loads((tmp_path / "kept.json").read_text())["results"] == first["results"]
    with pytest.raises(UserError, match="was measured on other images"):
        run(ckpt=straight, robustness=["corruptions"], split="val", reference=tmp_path / "one.json")


def test_the_page_in_a_browser(straight, tmp_path, browser):
    run(ckpt=straight, robustness=["corruptions"], output=tmp_path / "one.json")
    run(ckpt=straight, robustness=["all"], output=tmp_path / "two.json", reference=tmp_path / "one.json",
        benchmarks=tmp_path)  # fmt: skip
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((tmp_path / "two.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    text = page.inner_text("body")
    assert "relative to" in text
    assert "imagenet-sketch" in text
    page.close()


def test_a_subset_of_imagenet_from_the_command(train, tmp_path):
    """A model of twelve classes, and a test set with images of three of them."""
    data, generator = tmp_path / "data", np.random.default_rng(0)
    names = [f"n{number:08}" for number in range(12)]
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(names):
            (data / split / name).mkdir(parents=True)
            for index in range(count):
                color = (20 * label, 255 - 20 * label, int(generator.integers(0, 256)))
                Image.new("RGB", (20, 16), color).save(data / split / name / f"{index}.png")
    for name in names[3:6]:
        (tmp_path / "sets" / "imagenet-a" / name).mkdir(parents=True)
        Image.new("RGB", (30, 30), (60, 190, 9)).save(tmp_path / "sets" / "imagenet-a" / name / "x.jpg")
    run_dir = tmp_path / "run"
    changes = {"data__name": "folder", "data__root": data, "data__image_size": 16, "data__val_fraction": 0}
    assert train(run_dir, **changes, data__limit=36, data__workers=0, schedule__duration="2 steps") == 0
    found = run(ckpt=run_dir, robustness=["imagenet-a", "imagenet-r"], benchmarks=tmp_path / "sets")
    (result,) = found["results"]
    assert (result["benchmark"], result["images"], result["classes"]) == ("imagenet-a", 3, 3)
    assert result["top1"]["value"] == pytest.approx(100 / 3)  # identical images of three classes
    assert list(found["skipped"]) == ["imagenet-r"]
    assert (run_dir / "robustness-test.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmarks": "nowhere", "robustness": ["all"]}, "benchmarks=nowhere: there is no such folder"),
        ({"benchmarks": "."}, r"effect only with robustness="),
        ({"reference": "nowhere.json", "robustness": ["all"]}, r"reference=nowhere\.json cannot be used"),
        ({"report": True, "robustness": ["all"]}, "two evaluations"),
    ],
)
def test_wrong_settings_are_errors_before_anything_is_opened(options, message):
    with pytest.raises(UserError, match=message):
        evaluate(EvalConfig(ckpt="not looked at", **options), [])
