"""A comparison as a page: leaderboard, curves, differences, settings and cost."""

from collections.abc import Iterator, Sequence
from typing import Any

from moa_train.runs import text
from moa_train.runs.compare import Report, shown
from moa_train.runs.figures import Points, color, figure
from moa_train.runs.page import page
from moa_train.runs.read import Run
from moa_train.runtime.text import escape

MOST_POINTS = 400
"""Points of a training curve that are drawn."""


def as_html(report: Report) -> str:
    """Return the page."""
    return page("moa-compare", _body(report))


def _body(report: Report) -> Iterator[str]:
    groups = report.groups
    runs = [run for group in groups for run in group.runs]
    yield f"<h1>{len(runs)} runs, {len(groups)} settings</h1>"
    common = ", ".join(f"{key}={shown(value)}" for key, value in report.common.items())
    data = next((run.data(report.split) for run in runs if run.data(report.split)), {})
    images = f"{data.get('samples', 0):,} images of {data.get('name')}, fingerprint {data.get('fingerprint')}"
    yield f'<p class="quiet">{escape(common)}</p>'
    yield f'<p class="quiet">Final results on {escape(images)}.</p>' if data else ""
    yield "<h2>Leaderboard</h2>"
    yield _leaderboard(report)
    yield _list(report.notes, "quiet")
    yield "<h2>Curves</h2>"
    yield _curves(report)
    if report.comparisons:
        yield f"<h2>Differences from {_name(report, 0)}</h2>"
        yield from (_difference(report, place) for place in range(len(report.comparisons)))
    if groups[0].settings:
        yield "<h2>Settings that differ</h2>"
        header = ["", *groups[0].settings]
        yield _table(
            header,
            [[_name(report, place), *map(_value, group.settings.values())] for place, group in enumerate(groups)],
        )
    yield "<h2>Cost</h2>"
    header, rows = text.cost_rows(report)
    yield _table(header[1:], [[_name(report, int(row[0]) - 1), *row[2:]] for row in rows])
    yield '<p class="quiet">Training time is that of the updates at the median speed, without evaluations.</p>'
    yield "<details><summary>Run folders</summary>" + _list([str(run.path) for run in runs], "") + "</details>"


def _leaderboard(report: Report) -> str:
    header, rows = text.leaderboard_rows(report)
    cells = [[_name(report, place), *map(escape, row[2:])] for place, row in enumerate(rows)]
    return _table(header[1:], cells)


def _curves(report: Report) -> str:
    groups = report.groups[: text.CURVES]
    drawn = []
    if report.selection != "none":

        def score(run: Run) -> Points:
            return run.curve("eval", report.metric, report.selection)

        drawn.append((f"{report.metric} on {report.selection}", figure(report.metric, groups, score)))
    if report.metric != "loss":
        drawn.append(
            (
                f"loss on {report.selection}; faint: training loss with augmentation",
                figure("loss", groups, lambda run: run.curve("eval", "loss", report.selection), _training_loss),
            )
        )
    drawn.append(("learning rate", figure("lr", groups, lambda run: _thin(run.curve("train", "lr")))))
    figures = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in drawn)
    names = "".join(_name(report, place) for place in range(len(groups)))
    left = len(report.groups) - len(groups)
    rest = f"<p>The other {left} settings are not drawn.</p>" if left else ""
    return f'<div class="legend">{names}</div><div class="figures">{figures}</div>{rest}'


def _training_loss(run: Run) -> Points:
    return _thin(run.curve("train", "loss"))


def _thin(points: Points) -> Points:
    return points[:: len(points) // MOST_POINTS + 1]


def _difference(report: Report, place: int) -> str:
    comparison = report.comparisons[place]
    mood = {"better": "good", "worse": "bad"}.get(comparison.verdict.split()[0].rstrip(":"), "quiet")
    number = next(number for number, group in enumerate(report.groups) if group.label == comparison.label)
    parts = [f'<h3>{_name(report, number)}</h3><p class="{mood}">{escape(comparison.verdict.capitalize())}.</p>']
    header, rows = text.difference_rows(comparison)
    if rows:
        parts.append(_table(header, [list(map(escape, row)) for row in rows], left=("text",)))
    for title, (header, rows) in (
        ("Seed by seed", text.paired_rows(comparison)),
        ("McNemar's exact test", text.mcnemar_rows(comparison)),
    ):
        if rows:
            parts.append(_details(title, header, [list(map(escape, row)) for row in rows]))
    if comparison.classes:
        cells = [
            [escape(change.name), f"{change.images:,}", f"{change.reference:.1f}", f"{change.group:.1f}",
             f"{change.group - change.reference:+.1f}"]
            for change in comparison.classes
        ]  # fmt: skip
        header = ["class", "images", "reference %", "this %", "difference"]
        parts.append(_details("Classes that differ most", header, cells))
    if comparison.missing:
        lines = "\n".join(map(escape, comparison.missing))
        parts.append(f"<p>Tests on the same images need the predictions of each run:</p><pre>{lines}</pre>")
    return "".join(parts)


def _name(report: Report, place: int) -> str:
    label = escape(report.groups[place].label)
    return f'<span class="mark" style="--mark:{color(place)}">{label}</span>' if place < text.CURVES else label


def _value(value: Any) -> str:
    return escape(shown(value))


def _details(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return f"<details><summary>{escape(title)}</summary>{_table(header, cells)}</details>"


def _list(lines: Sequence[str], style: str) -> str:
    return f'<ul class="{style}">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _table(header: Sequence[str], cells: Sequence[Sequence[str]], left: Sequence[str] = ("name",)) -> str:
    """Return a table.

    Args:
        header: plain text.
        cells: HTML.
        left: classes of the first columns, which are aligned to the left: ``name`` may wrap, ``text`` does not.
    """

    def row(tag: str, values: Sequence[str]) -> str:
        styled = [f'<{tag} class="{style}">{value}</{tag}>' for style, value in zip(left, values, strict=False)]
        return "<tr>" + "".join([*styled, *(f"<{tag}>{value}</{tag}>" for value in values[len(left) :])]) + "</tr>"

    lines = [row("th", list(map(escape, header))), *(row("td", values) for values in cells)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
