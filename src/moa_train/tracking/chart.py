"""Curves in a terminal, drawn with ASCII characters."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

MARKS = "*o+x#@%&"
"""The characters of the curves, in order."""

Points = Sequence[tuple[float, float]]


def chart(curves: Mapping[str, Points], *, width: int = 72, height: int = 12, x_label: str = "") -> str:
    """Draw curves over each other.

    Args:
        curves: points (x, y) by name. Points that are not finite are left out.
        width: characters of a line.
        height: lines of the plot, without the axis and the legend, which is omitted for a single curve.
        x_label: what x is.
    """
    finite = {
        name: [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in curves.items()
    }
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return "(no values yet)"
    (left, right), (low, high) = (_range([point[axis] for point in everything]) for axis in (0, 1))
    labels = [f"{low + (high - low) * row / (height - 1):.4g}" for row in reversed(range(height))]
    margin = max(map(len, labels))
    columns = max(width - margin - 2, 8)
    canvas = [[" "] * columns for _ in range(height)]
    for mark, points in zip(MARKS * len(finite), finite.values(), strict=False):
        for column, y in _columns(points, left, right, columns).items():
            row = round((high - y) / (high - low) * (height - 1))
            canvas[row][column] = mark if canvas[row][column] == " " else canvas[row][column]
    lines = [f"{label:>{margin}} |{''.join(row).rstrip()}" for label, row in zip(labels, canvas, strict=True)]
    lines = [line if number % 3 == 0 else " " * margin + line[margin:] for number, line in enumerate(lines)]
    start, end = f"{left:.6g}", f"{right:.6g} {x_label}".rstrip()
    axis = [" " * margin + " +" + "-" * columns, f"{'':{margin}}  {start}{end:>{columns - len(start)}}"]
    legend = [f"  {mark} {name}" for mark, name in zip(MARKS * len(finite), finite, strict=False)]
    return "\n".join([*lines, *axis, *(legend if len(finite) > 1 else [])])


def _columns(points: Points, left: float, right: float, columns: int) -> dict[int, float]:
    """Return y at every column that a curve crosses, interpolated linearly; the last point of a column counts."""
    place = [((x - left) / (right - left) * (columns - 1), y) for x, y in sorted(points)]
    found = {round(x): y for x, y in place}
    for (x0, y0), (x1, y1) in pairwise(place):
        for column in range(math.ceil(x0), math.floor(x1) + 1):
            if column not in found and x1 > x0:
                found[column] = y0 + (y1 - y0) * (column - x0) / (x1 - x0)
    return found


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest value, or an interval around them if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1))
