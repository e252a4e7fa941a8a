"""Evaluate a model on shifted images: published test sets, and corruptions computed from the test images."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moa_train.assembly.evaluation import build_evaluation
from moa_train.assembly.trained import Trained
from moa_train.assembly.views import Views
from moa_train.data.source import Source
from moa_train.engine.metrics import has_probabilities, rank_of_label
from moa_train.engine.predictions import Predictions, Recorder
from moa_train.interfaces import Batch
from moa_train.report import page
from moa_train.report.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from moa_train.report.intervals import Interval, share
from moa_train.report.shifts import ALEXNET, READERS, Model, SkipError, real_labels
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.text import escape
from moa_train.schema import RunConfig
from moa_train.tracking.provenance import command


@dataclass(frozen=True)
class Robustness:
    """Evaluates a model on several test sets.

    Attributes:
        trained: the weights.
        run: the configuration that is evaluated.
        tta: averaging over views, as in ``EvalConfig``.
        model: on the device.
        distributed: the ranks.
    """

    trained: Trained
    run: RunConfig
    tta: str
    model: nn.Module
    distributed: Distributed

    def measure(self, names: Sequence[str], benchmarks: Path | None, clean: Source) -> dict[str, Any]:
        """Evaluate the test sets that are there.

        Args:
            names: test sets as in the setting ``robustness``.
            benchmarks: folder that holds the published ones.
            clean: images without a shift, which the corruptions are computed from.

        Returns:
            The results as JSON, with the reason for each test set that was skipped.
        """
        model, planned = Model(self.trained.classes, self.run.data), dict[str, Any]()
        skipped: dict[str, str] = {}
        for name in [*READERS, "imagenet-real", "corruptions"] if "all" in names else names:
            try:  # everything is opened before the first evaluation
                planned[name] = self._plan(name, benchmarks, clean, model)
            except SkipError as reason:
                skipped[name] = str(reason)
                if self.distributed.is_main:
                    print(f"{name} is skipped: {reason}", file=sys.stderr)
        control, results = Control(self._predict(clean)), list[dict[str, Any]]()
        for name, plan in planned.items():
            if name == "imagenet-real":
                results.append(control.real(plan))
            elif name == "corruptions":
                results += self._corrupted(clean, control)
            else:
                for shift in plan:
                    found = self._predict(shift.source, cropped=shift.cropped)
                    results.append(control.compare(found, shift.benchmark, shift.variant, shift.severity))
        return {
            "weights": str(self.trained.found.path),
            "data": clean.describe(),
            "tta": self.tta,
            "command": command(),
            "clean": control.accuracy().as_dict(),
            "results": results,
            "mean_corruption_error": errors_by_corruption(results, len(self.trained.classes)),
            "skipped": skipped,
        }

    def _plan(self, name: str, benchmarks: Path | None, clean: Source, model: Model) -> Any:
        """Open a test set: its parts, or the ReaL labels. Raises SkipError if it is not there or does not fit."""
        if name == "corruptions":
            return None
        if benchmarks is None:
            raise SkipError("benchmarks= is not set to the folder that holds it")
        if name == "imagenet-real":
            return real_labels(benchmarks, clean.files, model)
        shifts = list(READERS[name](benchmarks, model))
        if self.tta == "crops" and any(shift.cropped for shift in shifts):
            raise SkipError("its images are cropped already, so tta=crops cannot take crops of them")
        return shifts

    def _corrupted(self, clean: Source, control: "Control") -> Iterator[dict[str, Any]]:
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                source = clean.subset(np.arange(len(clean)), f"{name}/{severity}")
                found = self._predict(source, (name, severity))
                yield control.compare(found, "corruptions", name, severity)

    def _predict(
        self, source: Source, corruption: tuple[str, int] | None = None, *, cropped: bool = False
    ) -> Predictions:
        run, recorder = self.run, Recorder()
        if cropped:
            run = replace(run, data=replace(run.data, eval_crop=1.0))
        views = Views.plan(self.tta, run, source)
        if corruption is not None:
            views = replace(views, transform=_corrupted_first(views.transform, *corruption))
        evaluation = build_evaluation(run, source, self.distributed, stream=sys.stderr, record=recorder, views=views)
        evaluation(self.model)
        return recorder.gather(self.distributed)


def _corrupted_first(transform: Callable[[Batch], Tensor], name: str, severity: int) -> Callable[[Batch], Tensor]:
    def corrupted(batch: Batch) -> Tensor:
        images = corrupt(batch.images, batch.index.numpy(), name, severity)
        return transform(replace(batch, images=images))

    return corrupted


@dataclass(frozen=True)
class Control:
    """Predictions without a shift, for the accuracy on the same classes."""

    clean: Predictions

    def accuracy(self, present: NDArray[np.int64] | None = None) -> Interval:
        """Return the accuracy on the images of some classes, if the model has to choose among these."""
        return _accuracy(self.clean, present)

    def compare(self, found: Predictions, benchmark: str, variant: str, severity: int) -> dict[str, Any]:
        """Return the result of a test set as JSON.

        The model has to choose among the classes that the test set has, as is usual for subsets of ImageNet. The
        control is the accuracy on the clean images of the same classes, chosen among the same.
        """
        present = np.unique(found.labels)
        control = self.accuracy(present)
        return {
            "benchmark": benchmark,
            "variant": variant,
            "severity": severity,
            "images": len(found.labels),
            "classes": len(present),
            "top1": _accuracy(found, present).as_dict(),
            "clean": control.as_dict(),
        }

    def real(self, labels: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return the accuracy by ReaL labels as JSON; images without a label do not count."""
        predicted = self.clean.logits.argmax(1)
        valid = has_probabilities(torch.from_numpy(self.clean.logits)).numpy()
        rows = np.array([row for row, allowed in enumerate(labels) if allowed])
        hits = sum(bool(valid[row]) and int(predicted[row]) in labels[row] for row in rows)
        subset = Predictions(self.clean.labels[rows], self.clean.logits[rows])
        return {
            "benchmark": "imagenet-real",
            "variant": "",
            "severity": 0,
            "images": len(rows),
            "classes": len(np.unique(subset.labels)),
            "top1": share(hits, len(rows)).as_dict(),
            "clean": _accuracy(subset, None).as_dict(),
        }


def _accuracy(found: Predictions, present: NDArray[np.int64] | None) -> Interval:
    if present is None:
        present = np.arange(found.logits.shape[1])
    inside = np.isin(found.labels, present)
    logits, labels = found.logits[inside][:, present], np.searchsorted(present, found.labels[inside])
    rank = rank_of_label(torch.from_numpy(logits), torch.from_numpy(labels))
    return share(int((rank < 1).sum()), len(labels))


def errors_by_corruption(results: Sequence[Mapping[str, Any]], classes: int) -> dict[str, Any]:
    """Return the mean error of each corruption over its five severities, in percent, and their mean.

    For ImageNet-C, this includes the mean corruption error (mCE) by its definition: each error is divided by
    AlexNet's. It needs all 15 corruptions and all 1,000 classes.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if result["severity"]:
            errors = found.setdefault(result["benchmark"], {}).setdefault(result["variant"], [])
            errors.append(100 - result["top1"]["value"])
    summary: dict[str, Any] = {}
    for benchmark, kinds in found.items():
        means = {name: float(np.mean(errors)) for name, errors in kinds.items() if len(errors) == len(SEVERITIES)}
        if not means:
            continue
        counted = [name for name in means if name in ALEXNET] or list(means)
        if benchmark == "corruptions":
            counted = list(means)
        mean = float(np.mean([means[name] for name in counted]))
        summary[benchmark] = {"errors": means, "counted": counted, "mean": mean}
        whole = classes == 1000 and all(
            result["classes"] == 1000 for result in results if result["benchmark"] == benchmark
        )
        if benchmark == "imagenet-c" and whole and set(ALEXNET) <= set(means):
            ratios = [means[name] / error for name, error in ALEXNET.items()]
            summary[benchmark]["mce"] = float(np.mean(ratios))
    return summary


def relative_to(summary: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean corruption error relative to another model, in percent: the mean over the corruptions of the
    ratios of the errors.

    Raises:
        UserError: the two have no corruption in common.
    """
    relative = {}
    for benchmark, found in summary.items():
        others = reference.get(benchmark, {}).get("errors", {})
        ratios = [found["errors"][name] / others[name] for name in found["counted"] if others.get(name)]
        if ratios and len(ratios) == len(found["counted"]):
            relative[benchmark] = 100 * float(np.mean(ratios))
    if summary and not relative:
        raise UserError("reference= was not evaluated on the same corruptions. Evaluate it with the same settings.")
    return relative


def robustness_page(found: Mapping[str, Any]) -> str:
    """Return the results as an HTML page."""

    def text(interval: Mapping[str, float]) -> str:
        low, high = interval["low"], interval["high"]
        return (
            f'<!--{interval["value"]}--><span class="range"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
            f'<b style="left:{interval["value"]:.1f}%"></b></span> {interval["value"]:.2f}%'
        )

    singles = [result for result in found["results"] if not result["severity"]]
    rows = (
        [
            escape(f"{_title(one['benchmark'])} {one['variant']}"),
            f"{one['images']:,}",
            str(one["classes"]),
            text(one["top1"]),
            f"{one['top1']['low']:.2f} to {one['top1']['high']:.2f}",
            text(one["clean"]),
            f"{one['top1']['value'] - one['clean']['value']:+.2f}",
        ]
        for one in singles
    )
    head = ["test set", "images", "classes", "top-1", "95% interval", "clean control", "difference"]
    parts = []
    if singles:
        parts.append(
            page.section(
                "sets",
                "Test sets",
                page.table(head, rows, numbers=(1, 2, 3, 4, 5, 6)),
                "Predictions are restricted to the classes in the test set's labels. The clean control is the accuracy "
                "on unshifted images of the same classes, with the same restriction. For ImageNet ReaL, the control is "
                "the accuracy by the original labels.",
            )
        )
    for benchmark, summary in found["mean_corruption_error"].items():
        parts.append(_corruption_section(benchmark, summary, found))
    if found["skipped"]:
        parts.append(page.section("skipped", "Skipped", page.facts(found["skipped"].items())))
    parts.append(page.section("command", "Command", page.preformatted(found["command"])))
    clean = found["clean"]
    numbers = page.tiles([("clean top-1", f"{clean['value']:.2f}%", f"{clean['low']:.2f} to {clean['high']:.2f}")])
    name = found["data"]["name"]
    body = (
        f'<header><h1>Robustness: {escape(name)}</h1><p class="lead">{escape(found["weights"])}</p>{numbers}</header>'
        f"<main>{''.join(parts)}</main>"
    )
    return page.page(f"Robustness: {name}", body)


def _corruption_section(benchmark: str, summary: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    values = {
        (result["variant"], result["severity"]): result["top1"]["value"]
        for result in found["results"]
        if result["benchmark"] == benchmark
    }
    clean = next(result["clean"]["value"] for result in found["results"] if result["benchmark"] == benchmark)
    rows = (
        [
            escape(name.replace("_", " ")),
            *(_cell(values.get((name, severity)), clean) for severity in SEVERITIES),
            f"<b>{100 - error:.2f}%</b>",
        ]
        for name, error in summary["errors"].items()
    )
    head = ["corruption", *map(str, SEVERITIES), "mean"]
    lines = [
        f"Top-1 accuracy in percent, by severity; {clean:.2f} without a corruption.",
        f"Mean error: {summary['mean']:.2f}%.",
    ]
    if "mce" in summary:
        lines.append(f"Mean corruption error (mCE), relative to AlexNet: {summary['mce']:.2f}%.")
    elif benchmark == "imagenet-c":
        lines.append("The mCE is left out: it needs all 15 corruptions and all 1,000 classes.")
    if benchmark in found.get("relative", {}):
        relative = found["relative"][benchmark]
        lines.append(f"Mean corruption error relative to {escape(found['reference'])}: {relative:.2f}%.")
    if benchmark == "corruptions":
        lines.append(
            "These corruptions are computed here; the numbers do not compare with published ones of ImageNet-C or "
            "CIFAR-10-C."
        )
    table = page.table(head, rows, numbers=range(1, 7))
    return page.section(benchmark, _title(benchmark), table, " ".join(lines))


def _title(benchmark: str) -> str:
    """Return the usual spelling: ImageNet-C for imagenet-c."""
    name = benchmark.replace("imagenet", "ImageNet").replace("cifar", "CIFAR").replace("real", "ReaL")
    name = re.sub(r"-([a-z]|v2|sketch)$", lambda found: f"-{found[1].capitalize()}", name)
    return name[0].upper() + name[1:]


def _cell(value: float | None, clean: float) -> str:
    if value is None:
        return "-"
    lost = max(0.0, min(1.0, 1 - value / clean)) if clean else 0.0
    share = f"{100 * lost:.0f}%"
    return f"<!--{value}--><span class=shade style='--lost:{share}'>{value:.2f}</span>"
