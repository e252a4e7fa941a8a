"""The report of an evaluation: one HTML file and the same numbers as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moa_train.assembly.pictures import read_images
from moa_train.assembly.trained import Trained
from moa_train.data.augment import Normalize
from moa_train.data.source import Source
from moa_train.engine.predictions import Predictions
from moa_train.report import page, thumbnails
from moa_train.report.curves import Curves
from moa_train.report.findings import SHOWN, Findings
from moa_train.report.intervals import Interval
from moa_train.report.plots import reliability_plot
from moa_train.report.thumbnails import Sheets
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole
from moa_train.runtime.text import escape, printable
from moa_train.schema import RunConfig
from moa_train.serialization import to_dict
from moa_train.tracking.provenance import command, reproduce

_BUDGET = 2_400_000
"""Characters of thumbnails in the page."""
_PER_CELL = 48
"""Most images of a cell of the confusion matrix that are listed."""
_PAIRS = 30
"""Most confused pairs that are listed."""

ClassMap = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a model, normalized images (B, 3, H, W) and a class for each to maps of the evidence for it, (B, H, W)."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation to report.

    Attributes:
        trained: the weights.
        run: the configuration that was evaluated.
        split: its name.
        tta: averaging over views, as in ``EvalConfig``.
        source: the images of the split.
        predictions: of every image.
        model: the model, for its number of parameters.
    """

    trained: Trained
    run: RunConfig
    split: str
    tta: str
    source: Source
    predictions: Predictions
    model: nn.Module

    def write(self, path: Path, class_map: ClassMap | None = None) -> tuple[Path, Path]:
        """Write the report.

        Args:
            path: name of both files, without their suffixes.
            class_map: what to draw for the section "Where it looks"; without it, the section is left out.

        Returns:
            The HTML file and the JSON file.

        Raises:
            UserError: a file cannot be written.
        """
        found = Findings(self.predictions, self.source, trained_on=self._trained_on)
        facts = self.facts()
        html, data = (path.with_name(f"{path.name}.{suffix}") for suffix in ("html", "json"))
        write_whole(html, self._page(found, facts, class_map))
        write_whole(data, json.dumps({**facts, **found.as_dict()}, indent=1) + "\n")
        return html, data

    @property
    def _trained_on(self) -> bool:
        """Return whether the weights were trained on these images, according to the header of their file."""
        recorded = self.trained.metadata.get("fingerprint")  # older versions did not record it
        return self.split == "train" and recorded in (None, json.dumps(self.source.fingerprint))

    def facts(self) -> dict[str, Any]:
        """Return what was evaluated, as JSON."""
        trained, parameters = self.trained, sum(parameter.numel() for parameter in self.model.parameters())
        model = self.run.model
        origin = json.loads(trained.metadata.get("origin", "[]"))
        return {
            "split": self.split,
            "weights": str(trained.found.path),
            "weights_are": trained.found.description,
            "tta": self.tta,
            "precision": self.run.runtime.eval_precision,
            "model": {"title": model.title, "name": model.name, "variant": model.variant, "parameters": parameters},
            "data": self.source.describe(),
            "commands": [text for text in (reproduce(origin), command()) if text],
            "config": to_dict(self.run),
        }

    def _page(self, found: Findings, facts: dict[str, Any], class_map: ClassMap | None) -> str:
        cells = found.cells(_PER_CELL)
        errors = found.label_errors
        lists: dict[str, NDArray[np.int64]] = {
            "confident": found.confident_wrong,
            "uncertain": found.uncertain_right,
            "errors": np.array([], np.int64) if errors is None else errors[:SHOWN],
        }
        sheets = Sheets.of(self.source, _wanted(found, lists, cells), self.run.data.eval_crop, _BUDGET)
        shown = {int(row) for rows in (*lists.values(), *cells.values()) for row in rows}
        images = {
            row: [
                int(found.labels[row]),
                int(found.predicted[row]),
                round(float(found.probability[row]), 4),
                round(float(found.own_probability[row]), 4),
                printable(found.file(row)),
                *sheets.places.get(row, ()),
            ]
            for row in sorted(shown)
        }
        used = sorted({label for pair in found.confusion for label in pair})
        data = {
            "classes": [printable(name) for name in found.classes],
            "sheets": [thumbnails.PREFIX + file for file in sheets.files],
            "tile": sheets.size,
            "columns": thumbnails.COLUMNS,
            "images": images,
            "lists": {name: rows.tolist() for name, rows in lists.items()},
            "cells": {
                f"{label},{predicted}": [found.confusion[label, predicted], *rows.tolist()]
                for (label, predicted), rows in cells.items()
            },
            "order": used,
        }
        parts = [
            ("mistakes", "Mistakes", _mistakes(found)),
            ("confusion", "Confusion", _confusion(found)),
            ("classes", "Classes", _classes(found)),
            ("calibration", "Calibration", _calibration(found)),
            ("looks", "Where it looks", "" if class_map is None else self._looks(found, class_map)),
            ("training", "Training", self._curves()),
            ("provenance", "Model, data and provenance", _provenance(facts)),
        ]
        parts = [part for part in parts if part[2]]
        links = " ".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in parts)
        title = f"{facts['data']['name']}: {found.top['top1'].value:.2f}% top-1"
        subtitle = f"{self.run.model.title}, {facts['weights_are']}, evaluated on {len(found):,} images" + (
            "" if self.tta == "none" else f" with averaging over views ({self.tta})"
        )
        body = "\n".join(
            [
                f'<header><h1>{escape(title)}</h1><p class="lead">{escape(subtitle)}.</p>',
                *(f'<p class="note">{escape(note)}</p>' for note in found.notes()),
                _numbers(found),
                f'<nav aria-label="Sections">{links}</nav></header>',
                "<noscript>Images and the confusion matrix need JavaScript.</noscript><main>",
                *(page.section(anchor, heading, content) for anchor, heading, content in parts),
                "</main>",
            ]
        )
        return page.page(title, body, data=data, scripts=["evaluation.js"])

    def _curves(self) -> str:
        try:
            plots = Curves.read(self.trained.folder).plots()
        except UserError:  # weights outside of a run folder
            return ""
        return page.plots(plots)

    def _looks(self, found: Findings, class_map: ClassMap) -> str:
        """Draw the maps of the predicted class for the most confident images, six wrong ones and six right ones."""
        right = np.flatnonzero(found.rank < 1)
        right = right[np.argsort(-found.probability[right], kind="stable")][:6]
        rows = np.array([*found.confident_wrong[:6], *right])
        if not len(rows):
            return ""
        pixels = read_images(self.source, rows.tolist(), self.run.data.eval_crop)
        device = next(self.model.parameters()).device
        images_BCHW = Normalize.of(self.run.data)(pixels).to(device)
        was_training = self.model.training
        maps = class_map(self.model.eval(), images_BCHW, torch.from_numpy(found.predicted[rows]).to(device)).cpu()
        self.model.train(was_training)
        figures = []
        for row, image, weight in zip(rows, pixels, maps, strict=True):
            both = torch.cat([image, thumbnails.overlay(image, weight)], dim=2)
            text = f"{found.classes[found.predicted[row]]} {100 * found.probability[row]:.0f}%"
            if found.wrong[row]:
                text += f", label {found.classes[found.labels[row]]}"
            name = escape(found.file(int(row)))
            figures.append(
                f'<figure class="pair"><img src="{thumbnails.PREFIX}{thumbnails.encode(both)}" alt="{name}">'
                f'<figcaption>{escape(text)}<span class="file">{name}</span></figcaption></figure>'
            )
        lead = (
            "The image and the evidence for its predicted class: bright and orange pixels support this "
            "class. The most confident wrong predictions come first, then the most confident right ones."
        )
        return f'<p class="lead">{lead}</p><div class="images pairs">{"".join(figures)}</div>'


def _wanted(
    found: Findings, lists: dict[str, NDArray[np.int64]], cells: dict[tuple[int, int], NDArray[np.int64]]
) -> list[int]:
    """Return the images that get a thumbnail, the most important first.

    These are the lists, the listed pairs, and of all other cells one image in turn.
    """
    wrong = [cells[pair] for pair in found.worst_pairs]
    right = [rows for pair, rows in cells.items() if pair[0] == pair[1]]
    turns = [
        rows[turn] for turn in range(_PER_CELL) for rows in (*wrong, *(right if turn < 6 else ())) if turn < len(rows)
    ]
    wanted = np.concatenate([*lists.values(), *wrong[:_PAIRS], turns]).astype(np.int64)
    return list(dict.fromkeys(wanted.tolist()))


def _text(interval: Interval, unit: str = "", digits: int = 2) -> str:
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}{unit}"


def _numbers(found: Findings) -> str:
    total = len(found)
    entries = [
        (
            f"{name[:3]}-{name[3:]} accuracy",
            f"{interval.value:.2f}%",
            f"{_text(interval)}; {int((found.rank < int(name[3:])).sum()):,} of {total:,}",
        )
        for name, interval in found.top.items()
    ]
    entries.append(("loss", f"{found.loss.value:.4f}", _text(found.loss, digits=4)))
    if (calibration := found.calibration) is not None:
        error = calibration.before.error
        entries.append(("calibration error", f"{error.value:.2f}", f"{_text(error)} points (ECE)"))
    return page.tiles(entries)


def _mistakes(found: Findings) -> str:
    errors = found.label_errors
    parts = [
        "<h3>Most confident wrong predictions</h3>",
        _list("confident") if len(found.confident_wrong) else "<p>There are no wrong predictions.</p>",
        "<h3>Least certain right predictions</h3>",
        _list("uncertain") if len(found.uncertain_right) else "<p>There are no right predictions.</p>",
        "<h3>Probable label errors</h3>",
    ]
    if errors is None:
        parts.append(
            "<p>Left out: the model was trained on these images, and learned their wrong labels too. Evaluate a split "
            "that it was not trained on.</p>"
        )
    else:
        parts.append(
            f"<p>Confident learning selects {len(errors):,} images: another class is at least as probable as it is on "
            "average for images with its label, and the label is not the most probable class. The least plausible "
            "labels come first. The less accurate the model is, the more of these labels are in fact right.</p>"
        )
        parts.append(_list("errors") if len(errors) else "")
    return "\n".join(parts)


def _list(name: str) -> str:
    return f'<div class="images" data-list="{name}"></div>'


def _confusion(found: Findings) -> str:
    by_label = {one.name: one for one in found.by_class}

    def row(pair: tuple[int, int]) -> list[str]:
        label, predicted = (found.classes[index] for index in pair)
        count, images, where = found.confusion[pair], by_label[label].images, f"{pair[0]},{pair[1]}"
        return [
            f'<button type="button" class="link" data-cell="{where}">{escape(label)} &rarr; '
            f"{escape(predicted)}</button>",
            str(count),
            f"{100 * count / images:.1f}%",
            str(found.confusion.get(pair[::-1], 0)),
            f'<button type="button" data-find="{where}">Find</button>',
        ]

    head = ["label \N{RIGHTWARDS ARROW} predicted", "images", "share", "reverse", "matrix"]
    pairs = page.table(head, map(row, found.worst_pairs[:_PAIRS]), numbers=(1, 2, 3))
    return f"""<p class="lead">Rows are labels, columns are predicted classes. Blue is correct, orange is wrong; the
stronger, the larger the share of the row. Click a cell for its images. With the keyboard: arrows move, Enter opens,
+ and &minus; zoom.</p>
<div class="matrix"><div>
<div class="tools"><button type="button" id="zoom-in">Zoom in</button>
<button type="button" id="zoom-out">Zoom out</button>
<button type="button" id="zoom-all">Whole matrix</button></div>
<svg id="matrix" tabindex="0" role="application" aria-label="Confusion matrix" aria-describedby="cell"></svg>
<p id="cell" role="status" class="muted">Point at a cell for its numbers.</p>
</div><div><h3>Most frequent confusions</h3>
<p class="muted">The share is of the images with this label; the reverse is the number of confusions in the other
direction.</p>
{pairs if found.worst_pairs else "<p>There are none.</p>"}</div></div>"""


def _classes(found: Findings) -> str:
    places = {name: index for index, name in enumerate(found.classes)}

    def row(one: Any) -> list[str]:
        accuracy, precision = one.accuracy, one.precision
        name = f'<button type="button" class="link" data-class="{places[one.name]}">{escape(one.name)}</button>'
        bar = (
            f'<span class="range"><i style="left:{accuracy.low:.1f}%;width:{accuracy.high - accuracy.low:.1f}%"></i>'
            f'<b style="left:{accuracy.value:.1f}%"></b></span>'
        )
        worst = "" if one.confused_with is None else f"{escape(one.confused_with)} ({one.confusions})"
        return [
            name,
            f"{one.images:,}",
            f"<!--{accuracy.value}-->{accuracy.value:.1f}%",
            f"<!--{accuracy.low}-->{bar} {accuracy.low:.0f} to {accuracy.high:.0f}",
            "-" if precision is None else f"<!--{precision.value}-->{precision.value:.1f}%",
            f"{one.confidence:.1f}%",
            worst,
        ]

    head = ["class", "images", "accuracy", "95% interval", "precision", "mean confidence", "most often mistaken for"]
    rows = sorted(found.by_class, key=lambda one: one.accuracy.value)
    table = page.table(head, map(row, rows), numbers=(1, 2, 3, 4, 5), name="by-class")
    return f"""<p class="lead">The worst classes come first; a click on a title sorts, a click on a class shows its
wrongly classified images. Precision is the fraction of correct predictions among the images that are classified as
this class.</p>
<p><input type="search" data-filter="by-class" placeholder="Filter classes" aria-label="Filter classes"></p>
{table}"""


def _calibration(found: Findings) -> str:
    calibration = found.calibration
    if calibration is None:
        return ""
    before, after = calibration.before, calibration.after
    lead = (
        "A calibrated model is right in 80% of the cases where its confidence is 80%. Bars are the accuracy in each "
        "bin of confidence, with the number of images; dots are at the mean confidence. ECE is the mean distance from "
        "the diagonal in percentage points. Its interval is a bootstrap over images."
    )
    plots = [reliability_plot(before, f"As trained: ECE {before.error.value:.2f}")]
    if after is None:
        text = (
            "<p>No temperature was fitted: a half has fewer than 50 images, or none between 1/20 and 20 minimizes its "
            "loss.</p>"
        )
    else:
        plots.append(reliability_plot(after, f"With temperature: ECE {after.error.value:.2f}"))
        one, other = calibration.temperatures
        text = (
            f"<p>Temperature scaling divides the logits by {one:.3f} in one half of the images and by {other:.3f} in "
            "the other half. The temperature of each half was fitted on the other half, so none was fitted on an image "
            "that is reported here. It changes no prediction, only the probabilities: ECE "
            f"{before.error.value:.2f} ({_text(before.error)}) becomes {after.error.value:.2f} "
            f"({_text(after.error)}), and the loss {before.loss:.4f} becomes {after.loss:.4f}.</p>"
        )
    kinds = [("as trained", before), *([("with temperature", after)] if after else [])]
    tables = "".join(f"<h3>{name}</h3>{_bins(kind.as_dict()['bins'])}" for name, kind in kinds)
    return f'<p class="lead">{lead}</p>{page.plots(plots)}{text}{page.details("Numbers of the bins", tables)}'


def _bins(bins: Sequence[dict[str, Any]]) -> str:
    def row(one: dict[str, Any]) -> list[str]:
        limits = f"<!--{one['from']}-->{one['from']:.1f} to {one['to']:.1f}%"
        if not one["images"]:
            return [limits, "0", "-", "-", "-"]
        accuracy = Interval(**one["accuracy"])
        numbers = f"{one['confidence']:.2f}%", f"{accuracy.value:.2f}%", f"{_text(accuracy)}"
        return [limits, f"{one['images']:,}", *numbers]

    head = ["confidence", "images", "mean confidence", "accuracy", "95% interval"]
    return page.table(head, map(row, bins), numbers=(0, 1, 2, 3, 4))


def _provenance(facts: dict[str, Any]) -> str:
    config = facts["config"]
    model = [
        ("model", facts["model"]["title"]),
        ("parameters", f"{facts['model']['parameters']:,}"),
        ("weights", facts["weights"]),
        ("origin", facts["weights_are"]),
        ("precision", facts["precision"]),
        ("views", facts["tta"]),
    ]
    data = [(name.replace("_", " "), _plain(value)) for name, value in facts["data"].items()]
    optim = config["optim"]
    training = [
        ("optimizer", f"{optim['name']}, lr {optim['lr']:g}, weight decay {optim['weight_decay']:g}"),
        ("schedule", f"{config['schedule']['name']}, {config['schedule']['duration']}"),
        ("batch size", config["engine"]["batch_size"]),
        ("EMA decay", config["engine"]["ema_decay"]),
        ("seed", config["runtime"]["seed"]),
    ]
    cards = "".join(
        f"<div><h3>{title}</h3>{page.facts(entries)}</div>"
        for title, entries in (("Model", model), ("Data", data), ("Training", training))
    )
    commands = page.preformatted("\n\n".join(facts["commands"]))
    config_text = page.preformatted(json.dumps(config, indent=1))
    return (
        f'<div class="cards">{cards}</div><h3>Commands that produced these weights</h3>{commands}'
        f"{page.details('Full configuration', config_text)}"
    )


def _plain(value: Any) -> str:
    return (
        " x ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if type(value) is int else str(value)
    )
