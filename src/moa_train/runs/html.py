"""A comparison as a page: leaderboard, curves, differences, settings and cost."""

import re
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from moa_train.report import page
from moa_train.report.plots import COLORS, on_page
from moa_train.runs import text
from moa_train.runs.compare import Report, shown
from moa_train.runs.figures import Points, figure
from moa_train.runs.read import Run
from moa_train.runtime.text import escape

NUMBER = re.compile(r"$|-$|<!--|&lt;1e|[-+]?[\d.]")
"""Matches cells that begin with a number, and those without one."""
MOST_POINTS = 400
"""Points of a training curve that are drawn."""


def as_html(report: Report) -> str:
    """Return the page."""
    groups = report.groups
    runs = [run for group in groups for run in group.runs]
    title = f"{len(runs)} runs, {len(groups)} settings"
    body = "\n".join(
        [f"<header><h1>{title}</h1>{_subject(report, runs)}</header><main>", *_sections(report), "</main>"]
    )
    return page.page("moa-compare", body)


def _subject(report: Report, runs: Sequence[Run]) -> str:
    lines = [", ".join(f"{key}={shown(value)}" for key, value in report.common.items())]
    data = next((run.data(report.split) for run in runs if run.data(report.split)), {})
    if data:
        images = f"{data.get('samples', 0):,} images of {data.get('name')}, fingerprint {data.get('fingerprint')}"
        lines.append(f"Final results on {images}.")
    return "".join(f'<p class="muted">{escape(line)}</p>' for line in lines)


def _sections(report: Report) -> Iterator[str]:
    groups = report.groups
    yield page.section("leaderboard", "Leaderboard", _leaderboard(report) + _list(report.notes, "muted"))
    yield page.section("curves", "Curves", _curves(report))
    if report.comparisons:
        tests = "".join(_difference(report, place) for place in range(len(report.comparisons)))
        yield page.section("differences", f"Differences from {groups[0].label}", tests)
    if groups[0].settings:
        cells = [[_name(report, place), *map(_value, group.settings.values())] for place, group in enumerate(groups)]
        yield page.section("settings", "Settings that differ", _table(["settings", *groups[0].settings], cells))
    header, rows = text.cost_rows(report)
    seconds = [fmean([run.training_seconds or 0.0 for run in group.runs]) for group in groups]
    cost = _table(
        header[1:],
        [[_name(report, place), f"<!--{seconds[place]}-->{row[2]}", *row[3:]] for place, row in enumerate(rows)],
    )
    yield page.section(
        "cost", "Cost", cost, "Training time is that of the updates at the median speed, without evaluations."
    )
    yield page.details("Run folders", _list([str(run.path) for group in groups for run in group.runs]))


def _leaderboard(report: Report) -> str:
    header, rows = text.leaderboard_rows(report)
    cells = [[_name(report, place), *map(escape, row[2:])] for place, row in enumerate(rows)]
    return _table(header[1:], cells)


def _curves(report: Report) -> str:
    groups = report.groups[: text.CURVES]
    plots = []
    if report.selection != "none":

        def score(run: Run) -> Points:
            return run.curve("eval", report.metric, report.selection)

        plots.append(figure(f"{report.metric} on {report.selection}", groups, score))
    if report.metric != "loss":
        title = f"loss on {report.selection}; thin: training loss with augmentation"
        plots.append(figure(title, groups, lambda run: run.curve("eval", "loss", report.selection), _training_loss))
    plots.append(figure("learning rate", groups, lambda run: _thin(run.curve("train", "lr"))))
    names = "".join(_name(report, place) for place in range(len(groups)))
    left = len(report.groups) - len(groups)
    rest = f"<p>The other {left} settings are not drawn.</p>" if left else ""
    return f'<div class="legend">{names}</div>{page.plots(plots)}{rest}'


def _training_loss(run: Run) -> Points:
    return _thin(run.curve("train", "loss"))


def _thin(points: Points) -> Points:
    return points[:: len(points) // MOST_POINTS + 1]


def _difference(report: Report, place: int) -> str:
    comparison = report.comparisons[place]
    mood = {"better": "right", "worse": "wrong"}.get(comparison.verdict.split()[0].rstrip(":"), "muted")
    number = next(number for number, group in enumerate(report.groups) if group.label == comparison.label)
    parts = [f'<h3>{_name(report, number)}</h3><p class="{mood}">{escape(comparison.verdict.capitalize())}.</p>']
    header, rows = text.difference_rows(comparison)
    if rows:
        parts.append(_escaped(header, rows))
    for title, (header, rows) in (
        ("Seed by seed", text.paired_rows(comparison)),
        ("McNemar's exact test", text.mcnemar_rows(comparison)),
    ):
        if rows:
            parts.append(page.details(title, _escaped(header, rows)))
    if comparison.classes:
        cells = [
            [escape(change.name), f"{change.images:,}", f"{change.reference:.1f}", f"{change.group:.1f}",
             f"{change.group - change.reference:+.1f}"]
            for change in comparison.classes
        ]  # fmt: skip
        header = ["class", "images", "reference %", "this %", "difference"]
        parts.append(page.details("Classes that differ most", _table(header, cells)))
    if comparison.missing:
        commands = page.preformatted("\n".join(comparison.missing))
        parts.append(f"<p>Tests on the same images need the predictions of each run:</p>{commands}")
    return "".join(parts)


def _name(report: Report, place: int) -> str:
    label = escape(report.groups[place].label)
    if place >= text.CURVES:
        return label
    return f'<span class="mark" style="--mark:{on_page(COLORS[place])}">{label}</span>'


def _value(value: Any) -> str:
    return escape(shown(value))


def _list(lines: Sequence[str], style: str = "") -> str:
    return f'<ul class="{style}">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns of numbers are sorted as such; ``header`` is plain text, ``cells`` are HTML."""
    columns = enumerate(zip(*cells, strict=True))
    return page.table(header, cells, numbers=[n for n, column in columns if n and all(map(NUMBER.match, column))])


def _escaped(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _table(header, [list(map(escape, row)) for row in rows])
