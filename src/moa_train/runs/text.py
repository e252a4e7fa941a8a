"""A comparison as text for a terminal."""

from collections.abc import Sequence
from statistics import fmean

from moa_train.runs.compare import (
    LABELED,
    Comparison,
    Group,
    Report,
    mean_curve,
    seeds_of,
    shown,
    spread,
)
from moa_train.runs.statistics import Interval
from moa_train.tracking.chart import MARKS, chart
from moa_train.tracking.console import clock_time

CURVES = len(MARKS)
"""Most groups whose curves are drawn."""
SHOWN = 4
"""Most groups whose settings are shown in columns."""


def as_text(report: Report) -> str:
    """Return the whole comparison."""
    parts = [table(*leaderboard_rows(report))]
    for comparison in report.comparisons:
        tables = [
            found
            for found in (measure(comparison) for measure in (difference_rows, paired_rows, mcnemar_rows))
            if found[1]
        ]
        title = f"{comparison.label}, compared with {comparison.reference}: {comparison.verdict}"
        parts.append("\n".join([title, *(table(*found, indent=2) for found in tables)]))
    if len(report.groups[0].settings) > LABELED:
        parts.append(table(*setting_rows(report)))
    parts.append(table(*cost_rows(report)))
    if report.selection != "none":
        curves = {
            group.label: mean_curve([run.curve("eval", report.metric, report.selection) for run in group.runs])
            for group in report.groups[:CURVES]
        }
        parts.append(f"{report.metric} on {report.selection}\n{chart(curves, x_label='steps')}")
    if missing := list(dict.fromkeys(line for comparison in report.comparisons for line in comparison.missing)):
        title = "Tests on the same images need the predictions of each run. These commands write them:"
        parts.append("\n".join([title, *(f"  {line}" for line in missing)]))
    parts += [f"note: {note}" for note in report.notes]
    return "\n\n".join(parts)


def leaderboard_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the groups, the best one first."""
    best = [f"best {report.metric} on {report.selection}"] if report.selection != "none" else []
    header = ["", "settings", *best, *(f"{name} on {report.split}" for name in report.metrics), "difference", "runs"]
    results = {comparison.label: comparison.verdict.partition(":")[0] for comparison in report.comparisons}
    if report.comparisons:
        results[report.groups[0].label] = "reference"
    rows = []
    for place, group in enumerate(report.groups, 1):
        selected = [spread(group.selected, form(report.metric))] if best else []
        final = [spread(group.final[name], form(name)) for name in report.metrics]
        rows.append([str(place), group.label, *selected, *final, results.get(group.label, ""), states(group)])
    return header, rows


def difference_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a comparison: what was tested, the difference, and p if the test has one."""
    rows = []
    if comparison.top1 is not None and comparison.loss is not None:
        test = f"bootstrap over {comparison.images:,} images"
        rows.append(["top1", *interval(comparison.top1, "+.2f"), "", test])
        rows.append(["loss", *interval(comparison.loss, "+.4f"), "", test])
    for name, (found, p) in comparison.seeds.items():
        rows.append([name, *interval(found, "+" + form(name)), probability(p), "t-test over seeds, pooled variance"])
    return ["metric", "difference", "interval", "p", "test"], rows


def paired_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the differences of each seed."""
    rows = [
        [name, " ".join(f"{difference:+{form(name)}}" for difference in differences), probability(p)]
        for name, (differences, p) in comparison.paired.items()
    ]
    return ["seed by seed", "differences", "p (paired t-test)"], rows


def mcnemar_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of McNemar's tests."""
    header = ["McNemar's test", "right here, wrong there", "wrong here, right there", "p"]
    rows = [
        [f"seed {pair.seed}", f"{pair.gained:,}", f"{pair.lost:,}", probability(pair.p)] for pair in comparison.pairs
    ]
    return header, rows


def setting_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the settings that differ, with a column for each of the first groups."""
    groups = report.groups[:SHOWN]
    keys = report.groups[0].settings
    return ["setting", *(group.label for group in groups)], [
        [key, *(shown(group.settings[key]) for group in groups)] for key in keys
    ]


def cost_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of time, speed and memory."""
    header = ["", "settings", "training time", "images/s", "memory", "steps"]
    rows = []
    for place, group in enumerate(report.groups, 1):
        seconds, speed, memory = (
            [value for run in group.runs if (value := getattr(run, name)) is not None]
            for name in ("training_seconds", "images_per_second", "memory")
        )
        rows.append(
            [
                str(place),
                group.label,
                clock_time(fmean(seconds)) if seconds else "-",
                spread(speed, ",.0f"),
                f"{max(memory) / 2**30:.2f} GiB" if memory else "-",
                " ".join(f"{step:,}" for step in sorted({run.step for run in group.runs})),
            ]
        )
    return header, rows


def states(group: Group) -> str:
    """Describe how many runs a group has, and which of them are not finished."""
    if list(group.states) == ["finished"]:
        return f"{len(group.runs)} (seed{'s' if len(group.runs) > 1 else ''} {', '.join(map(str, seeds_of(group)))})"
    return ", ".join(f"{count} {state}" for state, count in group.states.items())


def interval(found: Interval, form: str) -> list[str]:
    """Return a difference and its interval as text."""
    return [f"{found.mean:{form}}", f"[{found.low:{form}}, {found.high:{form}}]"]


def probability(p: float | None) -> str:
    """Format a p value, if there is one."""
    if p is None:
        return "-"
    return f"{p:.2g}" if p >= 1e-16 else "<1e-16"


def form(metric: str) -> str:
    """Return the format of the values of a metric."""
    return ".2f" if metric in ("top1", "top5") else ".4f"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Return aligned columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    left = ("settings", "setting", "runs", "metric", "test", "seed by seed", "McNemar's test")
    return "\n".join(
        " " * indent
        + "  ".join(
            f"{cell:<{width}}" if title in left else f"{cell:>{width}}"
            for cell, width, title in zip(line, widths, header, strict=True)
        ).rstrip()
        for line in [header, *rows]
    )
