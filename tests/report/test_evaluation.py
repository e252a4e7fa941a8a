"""The report of an evaluation, opened in a real browser where there is one."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.assembly.trained import Trained
from moa_train.data.file_source import FileSource
from moa_train.data.tree import scan
from moa_train.engine.predictions import Predictions
from moa_train.report.evaluation import Evaluated

NAMES = [
    "<img src=x onerror=hacked=1>",
    "a & b \"c\" 'd'",
    "\x1b[31mred\n",
    "<\N{DIVISION SLASH}script><script>hacked=2",
    "東京",
]
FILES = ["<b>1<b>.png", 'a"b.png', "c\x07.png", "d&amp;.png"]


@pytest.fixture(scope="module")
def hostile(straight, tmp_path_factory) -> tuple[Path, dict, Evaluated]:
    """A report about classes and files whose names are markup, quotes and control characters."""
    root = tmp_path_factory.mktemp("hostile") / "test"
    generator = np.random.default_rng(0)
    for name in NAMES:
        folder = root / name
        folder.mkdir(parents=True)
        for file in FILES:
            Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / file)
        Image.new("RGB", (9, 9)).save(os.fsencode(folder) + b"/\xff.png")
    source = FileSource("photos/test", scan(root), (32, 32))
    logits = generator.normal(0, 2, (len(source), 5)).astype(np.float32)
    trained = Trained.open(straight)
    evaluated = Evaluated(
        trained, trained.config, "test", "none", source, Predictions(source.labels, logits), trained.build()
    )

    def class_map(model, images_BCHW, classes_B):
        return images_BCHW.mean(1)

    html, data = evaluated.write(root.parent / "report-test", class_map)
    return html, json.loads(data.read_text()), evaluated


@pytest.fixture
def opened(browser, hostile):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(hostile[0].as_uri())
    yield page
    assert not problems
    assert page.evaluate("typeof hacked") == "undefined"
    page.close()


def test_names_are_shown_as_text(opened):
    text = opened.evaluate("document.body.textContent")
    for shown in (
        "<img src=x onerror=hacked=1>",
        "a & b \"c\" 'd'",
        "\\x1b[31mred\\n",
        "東京",
        "c\\x07.png",
        "\\udcff",
    ):
        assert shown in text
    assert opened.locator("img:not([src^=data])").count() == 0
    assert opened.locator(".tile b, figcaption i, td i:not(.range i)").count() == 0


def test_cells_and_classes_show_their_images(opened, hostile):
    worst = max((cell for cell in hostile[1]["confusion"] if cell["label"] != cell["predicted"]), key=_images)
    opened.locator("[data-cell]").first.click()
    dialog = opened.locator("dialog")
    assert dialog.is_visible()
    assert dialog.locator("figure").count() == worst["images"]
    opened.wait_for_function(
        "document.querySelector('dialog canvas').getContext('2d').getImageData(9, 9, 1, 1).data[3]"
    )
    opened.keyboard.press("Escape")
    assert not dialog.is_visible()
    opened.locator("[data-class]").first.click()
    lowest = min(hostile[1]["classes"], key=lambda one: one["accuracy"]["value"])
    wrong = lowest["images"] - round(lowest["accuracy"]["value"] * lowest["images"] / 100)
    assert dialog.locator("figure").count() == wrong


def _images(cell: dict) -> int:
    return cell["images"]


def test_the_matrix_works_with_the_keyboard(opened, hostile):
    opened.locator("#matrix").focus()
    opened.keyboard.press("ArrowRight")
    status = opened.locator("#cell").text_content()
    assert "classified as" in status
    counts = {(cell["label"], cell["predicted"]): cell["images"] for cell in hostile[1]["confusion"]}
    label, predicted = sorted(NAMES)[:2]
    assert f": {counts.get((label, predicted), 0)} images" in status
    opened.keyboard.press("ArrowLeft")
    opened.keyboard.press("Enter")
    assert opened.locator("dialog").is_visible() == ((label, label) in counts)


def test_tables_sort_by_numbers_and_names(opened):
    title = opened.locator("#by-class th", has_text="accuracy").first
    column = "rows => rows.map(row => parseFloat(row.cells[2].textContent))"
    for direction in ("descending", "ascending"):
        title.locator("button").click()
        assert title.get_attribute("aria-sort") == direction
        values = opened.locator("#by-class tbody tr").evaluate_all(column)
        assert values == sorted(values, reverse=direction == "descending")
    opened.locator("input[type=search]").fill("東")
    assert opened.locator("#by-class tbody tr:visible").count() == 1


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_text_has_contrast(browser, hostile, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(hostile[0].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colors = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    ink, paper = (sum(map(int, color[4:-1].split(","))) for color in colors)
    assert (paper - ink > 500) if scheme == "light" else (ink - paper > 500)
    page.close()


def test_the_json_has_the_numbers_of_the_page(hostile):
    html, found, evaluated = hostile
    assert found["total"] == 25
    predicted = evaluated.predictions.logits.argmax(1)
    assert found["top1"]["count"] == (predicted == evaluated.predictions.labels).sum()
    text = html.read_text()
    assert f"{found['top1']['value']:.2f}%" in text
    assert "Where it looks" in text
    assert ("No temperature was fitted" in text) == (found["calibration"]["after"] is None)
    assert any("moa-train" in command or "pytest" in command for command in found["commands"])


def test_an_own_model_is_named(hostile, tmp_path):
    evaluated = hostile[2]
    run = replace(evaluated.run, model=replace(evaluated.run.model, name="my_package.blocks:Tiny"))
    page = replace(evaluated, run=run).write(tmp_path / "report")[0].read_text()
    assert '<p class="lead">Tiny, ' in page
    assert "<dt>model</dt><dd>Tiny</dd>" in page


@pytest.mark.parametrize("own", [True, False])
def test_label_errors_are_left_out_for_the_images_of_the_training_only(straight, hostile, own):
    trained = Trained.open(straight)
    source = trained.open_split("train") if own else hostile[2].source
    evaluated = replace(hostile[2], trained=trained, split="train", source=source)
    assert evaluated._trained_on == own


def test_a_page_of_ten_thousand_images_is_small(straight, tmp_path):
    from moa_train.data.array_source import ArraySource

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2500, 3, 32, 32), dtype=np.uint8).repeat(4, 0)  # noise: the largest files
    labels = generator.integers(0, 100, 10_000)
    source = ArraySource("noise/test", images, labels, [f"class {k}" for k in range(100)], (32, 32))
    logits = generator.normal(size=(10_000, 100)).astype(np.float32)
    trained = Trained.open(straight)
    model = torch.nn.Linear(1, 1)
    evaluated = Evaluated(trained, trained.config, "test", "none", source, Predictions(labels, logits), model)
    html, _ = evaluated.write(tmp_path / "report")
    assert html.stat().st_size < 5_000_000
