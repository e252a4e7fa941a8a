"""Draw the figures of docs/RESULTS.md as SVG files whose bytes depend only on their data and on this file."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa_train.report.plots import COLORS
from moa_train.runtime.files import write_whole
from moa_train.runtime.libraries import require

STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")


def digest(figure: Mapping[str, Any]) -> str:
    """Return what identifies a figure: a hash of its data and of the code that draws it."""
    rounded = json.loads(json.dumps(figure), parse_float=lambda text: round(float(text), 4))  # versions of scipy differ
    return hashlib.sha256(json.dumps(rounded).encode() + Path(__file__).read_bytes()).hexdigest()


def draw(figure: Mapping[str, Any], path: Path) -> None:
    """Draw a figure to an SVG file, unless the file shows the same data already.

    Another version of matplotlib draws the same figure with other bytes, so the file is not drawn again for that.

    Raises:
        UserError: matplotlib is not installed.
    """
    if path.is_file() and digest(figure) in path.read_text():
        return
    require("Drawing a figure", ["matplotlib"], "plot")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9.5}):
        drawing = Figure(layout="constrained")
        {"lines": _lines, "differences": _differences, "minutes": _minutes}[figure["kind"]](drawing, figure)
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Description": digest(figure)})
    write_whole(path, file.getvalue().replace(" \n", " "))  # a line for each path instead of each point


def _lines(drawing: Any, figure: Mapping[str, Any]) -> None:
    """Draw panels of curves, each with a band of one standard deviation."""
    panels = figure["panels"]
    drawing.set_size_inches(4.6 * len(panels), 3.6)
    for axes, panel in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for place, (label, line) in enumerate(panel["lines"].items()):
            color, style = COLORS[place % len(COLORS)], STYLES[place % len(STYLES)]
            axes.plot(line["x"], line["mean"], style, color=color, linewidth=1.6, label=label)
            low, high = zip(
                *((y - error, y + error) for y, error in zip(line["mean"], line["deviation"], strict=True)),
                strict=True,
            )
            axes.fill_between(line["x"], low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel("epochs (band: standard deviation over seeds)")
        _finish(axes, panel["title"])
    _legend(drawing)


def _differences(drawing: Any, figure: Mapping[str, Any]) -> None:
    """Draw differences with intervals, one below the other in groups. Color and marker show whether zero is inside."""
    count = sum(len(points) + 1 for points in figure["groups"].values())
    drawing.set_size_inches(8.2, 0.24 * count + 1.1)
    axes = drawing.subplots()
    labels, place = {}, 0
    for group, points in figure["groups"].items():
        at = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(0.01, place, group, fontweight="bold", in_layout=False, **at)
        place += 1
        for label, point in points.items():
            low, high = point["interval"] or (0.0, 0.0)
            shade, marker = ("0.45", "o") if low <= 0 <= high else (COLORS[0], ">") if low > 0 else (COLORS[1], "<")
            if point["interval"]:
                axes.plot([low, high], [place, place], color=shade, linewidth=1.6)
            face = shade if point["interval"] else "white"
            axes.plot(point["mean"], place, marker, color=shade, markerfacecolor=face, markersize=6)
            axes.text(1.01, place, f"{point['mean']:+.2f}", **at)
            labels[place] = label
            place += 1
    points = [point for group in figure["groups"].values() for point in group.values()]
    means = [0.0, *(point["mean"] for point in points)]
    ends = [end for point in points for end in point["interval"] or ()] + means
    room = max(0.5, max(means) - min(means))  # intervals of two seeds can be ten times as wide, and are cut off
    axes.set_xlim(max(min(ends), min(means) - room) - 0.1, min(max(ends), max(means) + room) + 0.1)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_ylim(place - 0.3, -0.7)
    for name, shade, marker in (("worse", COLORS[1], "<"), ("within noise", "0.45", "o"), ("better", COLORS[0], ">")):
        axes.plot([], [], color=shade, marker=marker, linewidth=1.6, label=name)
    drawing.supxlabel(figure["unit"], fontsize=9)
    _finish(axes, "")
    _legend(drawing)


def _minutes(drawing: Any, figure: Mapping[str, Any]) -> None:
    """Draw accuracy against minutes, with error bars over seeds. Color and marker show the machine."""
    from matplotlib.ticker import LogLocator, NullLocator

    panels = figure["panels"]
    drawing.set_size_inches(8.2, 3.8 * len(panels))
    machines = sorted({point["machine"] for points in panels.values() for point in points})
    for axes, (title, points) in zip(
        drawing.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        for number, machine in enumerate(machines):
            own = [point for point in points if point["machine"] == machine]
            if own:
                x, y = ([point[axis] for point in own] for axis in "xy")
                axes.errorbar(
                    [value["mean"] for value in x],
                    [value["mean"] for value in y],
                    xerr=[value["deviation"] for value in x],
                    yerr=[value["deviation"] for value in y],
                    color=COLORS[number % len(COLORS)],
                    marker=MARKERS[number % len(MARKERS)],
                    capsize=2,
                    linestyle="",
                    label=machine,
                )
        x, y = ([point[axis]["mean"] for point in points] for axis in "xy")
        low, high = min(y) - 2, max(y) + 2
        place = low
        for point in sorted(points, key=lambda point: point["y"]["mean"]):  # labels upward, without overlap
            at = point["x"]["mean"], point["y"]["mean"]
            place = max(at[1], place + 0.05 * (high - low))
            line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6}
            axes.annotate(point["label"], at, (max(x) * 1.3, place), va="center", fontsize=8, arrowprops=line)
        axes.set_xscale("log")
        axes.set_xlim(min(x) / 1.5, max(x) * 5)
        axes.set_ylim(low, max(high, place + 1))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))  # more labels would overlap
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("minutes of training without evaluations, of runs that had their machine for themselves")
        _finish(axes, f"top-1 (%), {title}")
    _legend(drawing)


def _legend(drawing: Any) -> None:
    """Draw one legend for all panels, above them."""
    handles = {}
    for axes in drawing.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    drawing.legend(handles.values(), handles.keys(), frameon=False, loc="outside upper center", ncols=3)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
