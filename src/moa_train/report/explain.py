"""One picture per image: what the model predicts, the class map, and the attention of MOA blocks and local blocks."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moa_train.report.attention import WindowMap
from moa_train.report.class_map import CELLS
from moa_train.runtime.errors import UserError
from moa_train.runtime.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUERY, KEY = "#d55e00", "#0072b2"  # Okabe-Ito: safe for color-blind readers
_MOST_NUMBERS = 16
"""Windows up to which their weights are written into them."""


def draw_explanation(
    path: Path,
    pixels_CHW: Tensor,
    map_HW: Tensor,
    between: Sequence[WindowMap],
    within: Sequence[WindowMap],
    *,
    title: str,
    explained: str,
    predictions: tuple[Sequence[str], Sequence[float]],
    window: tuple[int, int] | None = None,
) -> None:
    """Draw the explanation of one image to a PNG file.

    Args:
        path: file to write.
        pixels_CHW: the image as the model receives it, uint8.
        map_HW: its class map.
        between: attention between windows, of this image only (B = 1).
        within: attention within windows, likewise.
        title: name of the image.
        explained: name of the class that the class map explains.
        predictions: names and probabilities of the most likely classes.
        window: row and column of a window of the first stage. Its attention is drawn, and in later stages that of the
            windows at its center (default: the window with the largest sum of the class map).

    Raises:
        UserError: there is no such window, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    last = {found.stage: found for found in within}  # the last local block of every stage
    spatial = [found for found in between if found.is_spatial]
    center = _center(window, map_HW, (spatial or [*last.values()])[:1])
    image_HWC = pixels_CHW.permute(1, 2, 0).numpy()
    names, probabilities = predictions
    lines = [f"{100 * value:.1f}%  {_plain(name, 26)}" for name, value in zip(names, probabilities, strict=True)]
    about = f"class map: {_plain(explained, 24)}\nred: for it, blue: against it"
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _image(axes, image_HWC, "\n".join(lines[:3])),
        lambda axes: _class_map(axes, image_HWC, map_HW, about),
    ]
    windows = {found.stage: found for found in between}
    for stage in sorted(last, key=lambda stage: stage != max(last)):  # the last stage has no MOA block and comes first
        panels.append(partial(_local, image_HWC=image_HWC, found=last[stage], center=center))
        if stage in windows:
            panels.append(partial(_keys, image_HWC=image_HWC, found=windows[stage], center=center))
            panels.append(partial(_matrix, found=windows[stage]))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.7 * rows + 0.3), layout="constrained")
    figure.suptitle(_plain(title, 30 * columns), parse_math=False, fontsize=11, x=0.01, ha="left")
    for axes, panel in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, panels):
        panel(axes) if panel else axes.axis("off")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # names may use any script
            figure.savefig(path, dpi=100)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}. Choose another folder with explain=.") from error


def _center(window: tuple[int, int] | None, map_HW: Tensor, layers: Sequence[WindowMap]) -> tuple[int, int]:
    """Return the pixel whose windows are drawn."""
    if not layers:
        return 0, 0
    layer, (rows, columns) = layers[0], layers[0].grid
    if window is None:
        sums = {
            (row, column): map_HW[top:bottom, left:right].sum().item()
            for row in range(rows)
            for column in range(columns)
            for top, left, bottom, right in [layer.box(row, column)]
        }
        window = max(sums, key=lambda place: sums[place])
    if not (0 <= window[0] < rows and 0 <= window[1] < columns):
        raise UserError(
            f"explain_window=[{window[0]},{window[1]}]: the first stage has {rows} x {columns} windows, from [0,0] to "
            f"[{rows - 1},{columns - 1}]."
        )
    top, left, bottom, right = layer.box(*window)
    return (top + bottom - 1) // 2, (left + right - 1) // 2


def _image(axes: "Axes", image_HWC: NDArray[np.uint8], title: str, alpha: float = 1.0) -> None:
    axes.imshow(image_HWC, alpha=alpha, interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(-0.5, image_HWC.shape[1] - 0.5)
    axes.set_ylim(image_HWC.shape[0] - 0.5, -0.5)


def _class_map(axes: "Axes", image_HWC: NDArray[np.uint8], map_HW: Tensor, title: str) -> None:
    """Draw the means over the cells that `faithfulness` ranks, because the values of single pixels are noisy."""
    cells = F.adaptive_avg_pool2d(map_HW[None, None], min(CELLS, *map_HW.shape))
    smooth = F.interpolate(cells, map_HW.shape, mode="bilinear")[0, 0]
    limit = max(float(smooth.abs().max()), 1e-12)
    gray_HW = image_HWC.mean(2)
    axes.imshow(gray_HW, cmap="gray", vmin=-80, vmax=335)  # pale, so that the colors stand out
    strength = (smooth.abs() / limit).mul(0.9).numpy()
    axes.imshow(smooth.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=strength)
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])


def _rectangle(axes: "Axes", box: tuple[int, int, int, int], **style: Any) -> None:
    from matplotlib.patches import Rectangle

    top, left, bottom, right = box
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **style))


def _keys(axes: "Axes", image_HWC: NDArray[np.uint8], found: WindowMap, center: tuple[int, int]) -> None:
    """Draw the key of every window, with its overlap, as dark as its weight for the query of one window."""
    if not found.is_spatial:
        axes.axis("off")
        text = "The windows of the\npublished MOA block are\nnot areas of the image."
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9)
        return
    window = found.window_at(*center)
    rows, columns = found.grid
    weights = found.weights[0].float().mean(0)[window[0] * columns + window[1]].view(rows, columns)
    title = f"stage {found.stage}: MOA attention of window [{window[0]},{window[1]}]\nto the keys of all windows"
    _image(axes, image_HWC, title, alpha=0.45)
    limit = float(weights.max())
    for row in range(rows):
        for column in range(columns):
            weight = float(weights[row, column])
            box = found.box(row, column, found.overlap)  # overlapping keys add up
            _rectangle(axes, box, facecolor=KEY, alpha=0.5 * weight / limit, linewidth=0)
            _rectangle(axes, box, fill=False, edgecolor=KEY, linewidth=0.8, alpha=0.7)
            if rows * columns <= _MOST_NUMBERS:
                top, left, bottom, right = found.box(row, column)
                style = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.5}
                place = ((left + right - 1) / 2, (top + bottom - 1) / 2)
                axes.text(*place, f"{100 * weight:.1f}%", ha="center", va="center", fontsize=8, bbox=style)
    _rectangle(axes, found.box(*window), fill=False, edgecolor=QUERY, linewidth=2)


def _matrix(axes: "Axes", found: WindowMap) -> None:
    """Draw the weights of all pairs of windows, averaged over the heads."""
    weights = 100 * found.weights[0].float().mean(0)
    heads = found.weights.shape[1]
    mean = "1 head" if heads == 1 else f"mean of {heads} heads"
    title = f"stage {found.stage}: MOA attention, {mean}\nrows: queries, columns: keys, in %"
    shown = axes.imshow(weights.numpy(), cmap="Blues", vmin=0)
    axes.set_title(title, fontsize=9, loc="left")
    count = len(weights)
    axes.set_xticks(range(0, count, max(1, count // 8)))
    axes.set_yticks(range(0, count, max(1, count // 8)))
    axes.tick_params(labelsize=7)
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=7)


def _local(axes: "Axes", image_HWC: NDArray[np.uint8], found: WindowMap, center: tuple[int, int]) -> None:
    """Draw how much the positions of a window receive from all positions of this window, in the last local block."""
    row, column = found.window_at(*center)
    weights = found.weights[0, row * found.grid[1] + column].float().mean((0, 1))  # over heads and queries
    side, pixels = found.window, found.window * found.position
    _image(axes, image_HWC, f"stage {found.stage}: local attention within\nwindow [{row},{column}]", alpha=0.45)
    left, top = column * pixels - 0.5, row * pixels - 0.5
    values = torch.where(weights > 0, weights, torch.nan).view(side, side).numpy()  # padding has no weight
    axes.imshow(
        values,
        cmap="Blues",
        vmin=0,
        alpha=0.7,
        extent=(left, left + pixels, top + pixels, top),
        interpolation="nearest",
    )
    axes.set_xlim(-0.5, image_HWC.shape[1] - 0.5)
    axes.set_ylim(image_HWC.shape[0] - 0.5, -0.5)
    _rectangle(axes, found.box(row, column), fill=False, edgecolor=QUERY, linewidth=2)


def _plain(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."
