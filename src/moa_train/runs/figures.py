"""Curves of groups of runs as SVG elements of a page, whose text and axes take the color of the page."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from moa_train.runs.compare import Group, mean_curve
from moa_train.runs.read import Run
from moa_train.runtime.errors import UserError
from moa_train.tracking.curves import COLORS

Points = Sequence[tuple[float, float]]
INK = "#010203"
"""A color that stands for the color of the page's text."""


def color(place: int) -> str:
    """Return the color of a group."""
    return COLORS[place % len(COLORS)]


def figure(
    title: str, groups: Sequence[Group], points: Callable[[Run], Points], dashed: Callable[[Run], Points] | None = None
) -> str:
    """Draw a curve for each run: the mean of a group boldly, its runs faintly.

    Args:
        title: of the figure, also for readers of the page who cannot see it.
        groups: with the colors of their places.
        points: returns (x, y) of a run.
        dashed: further points, drawn as thin lines.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("The page needs matplotlib: pip install 'moa-train[plot]'.") from error
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 10,
    }
    inked: dict[Any, Any] = {f"{name}color": INK for name in ("axes.edge", "axes.label", "xtick.", "ytick.", "text.")}
    with mpl.rc_context({**settings, **inked}):
        drawing = Figure(figsize=(5, 3.2), layout="constrained")
        axes = drawing.subplots()
        for place, group in enumerate(groups):
            several = len(group.runs) > 1
            for run in group.runs:
                curve = points(run)
                _line(axes, curve, color(place), 0.9 if several else 1.8, 0.5 if several else 1.0)
                if dashed is not None:
                    _line(axes, dashed(run), color(place), 0.8, 0.5)
            if several:
                _line(axes, mean_curve([points(run) for run in group.runs]), color(place), 2.0, 1.0)
        axes.set_xlabel("steps")
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    svg = re.sub(r"font: ([^;']*?)'[^']*'[^;\"]*", r"font: \1system-ui, sans-serif", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)


def _line(axes: Any, points: Points, shade: str, width: float, alpha: float) -> None:
    if points:
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else None  # a line through one point is invisible
        axes.plot(x, y, color=shade, linewidth=width, alpha=alpha, marker=marker)
