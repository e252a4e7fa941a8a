"""Curves of groups of runs as SVG elements of a page."""

from collections.abc import Callable, Sequence
from typing import Any

from moa_train.report.plots import COLORS, svg
from moa_train.runs.compare import Group, mean_curve
from moa_train.runs.read import Run

Points = Sequence[tuple[float, float]]


def figure(
    title: str, groups: Sequence[Group], points: Callable[[Run], Points], faint: Callable[[Run], Points] | None = None
) -> str:
    """Draw a curve for each run: the mean of a group boldly, its runs thinly.

    Args:
        title: of the figure, also for readers of the page who cannot see it.
        groups: at most as many as there are `COLORS`.
        points: returns (x, y) of a run.
        faint: further points of a run, drawn as a thin line.
    """

    def draw(axes: Any) -> None:
        for shade, group in zip(COLORS, groups, strict=False):
            several = len(group.runs) > 1
            for run in group.runs:
                _line(axes, points(run), shade, 0.9 if several else 1.8, 0.5 if several else 1.0)
                if faint is not None:
                    _line(axes, faint(run), shade, 0.8, 0.5)
            if several:
                _line(axes, mean_curve([points(run) for run in group.runs]), shade, 2.0, 1.0)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("steps")
        axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)

    return svg(draw, title)


def _line(axes: Any, points: Points, shade: str, width: float, alpha: float) -> None:
    if points:
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else None  # a line through one point is invisible
        axes.plot(x, y, color=shade, linewidth=width, alpha=alpha, marker=marker)
