"""Plots as inline SVG that follows the colors of the page, drawn by matplotlib."""

import io
import re
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from moa_train.report.calibration import BINS, Reliability
from moa_train.runtime.text import escape

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""The colors of Okabe and Ito, which color-blind readers can distinguish, with a gray instead of the yellow."""
_VARIABLES = {"#000000": "var(--ink)", "#e6e6e6": "var(--line)", "#666666": "var(--muted)"}
"""Colors of matplotlib in the SVG, and the variables of the page that replace them."""


def on_page(color: str) -> str:
    """Return the color as CSS, as it is drawn on a page."""
    return _VARIABLES.get(color, color)


def preload() -> None:
    """Start to import what draws, while the evaluation leaves cores idle.

    Importing takes half a second. Do not call this if worker processes will be forked.
    """
    threading.Thread(target=import_module, args=("matplotlib.backends.backend_svg",), daemon=True).start()


def svg(draw: Callable[[Any], None], description: str, size: tuple[float, float] = (4.6, 3.2)) -> str:
    """Return a plot as an SVG element.

    Args:
        draw: draws onto axes of matplotlib.
        description: text for screen readers.
        size: width and height in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text stays text. A fixed salt makes the file the same every time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "font.size": 9}):
        figure = Figure(figsize=size)  # its constrained layout would draw everything twice
        figure.subplots_adjust(left=0.13, right=0.96, bottom=0.14, top=0.91)
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # the same in every plot, and not used
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    # Black text has no color in matplotlib's SVG, so that it takes the one of the element.
    start = f'<svg role="img" aria-label="{escape(description)}" style="fill: var(--ink); stroke-linejoin: round"'
    return start + re.sub(r' (width|height)="[\d.]+pt"', "", text.removeprefix("<svg"), count=2)


def reliability_plot(found: Reliability, title: str) -> str:
    """Return a reliability diagram with the number of images in each bin; empty bins stay empty."""

    def draw(axes: Any) -> None:
        edges = 100 * np.arange(BINS) / BINS
        full = found.counts > 0
        width = 100 / BINS
        axes.bar(edges[full] + width / 2, found.accuracy[full], width * 0.92, color="#0072b2", alpha=0.75)
        axes.plot([0, 100], [0, 100], color="0.4", linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(found.confidence[full], found.accuracy[full], "o", color="#d55e00", markersize=3.5)
        for edge, count, accuracy in zip(edges[full], found.counts[full], found.accuracy[full], strict=True):
            axes.text(edge + width / 2, accuracy + 2, _short(count), ha="center", va="bottom", fontsize=6.5)
        for edge in edges[~full]:
            axes.text(edge + width / 2, 1, "empty", ha="center", va="bottom", fontsize=6.5, rotation=90, color="0.4")
        axes.set(xlim=(0, 100), ylim=(0, 112), xlabel="confidence (%)", ylabel="accuracy (%)")
        axes.set_yticks(range(0, 101, 20))
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)

    return svg(draw, title)


def _short(count: int) -> str:
    return f"{count}" if count < 1000 else f"{count / 1000:.3g}k"
