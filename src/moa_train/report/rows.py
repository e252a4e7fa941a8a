"""Predictions as text: a table for people, JSON lines and CSV for programs."""

import csv
import json
from collections.abc import Callable, Sequence
from typing import TextIO

from moa_train.runtime.text import printable

Row = Callable[[str, Sequence[str], Sequence[float]], None]
"""Writes the prediction for one image: its path, names of classes, and their probabilities."""


def open_rows(form: str, stream: TextIO, paths: Sequence[str], classes: Sequence[str]) -> Row:
    """Return the function that writes predictions to ``stream`` as ``table``, ``jsonl`` or ``csv``.

    Names of files and classes are not trusted. JSON escapes them without loss. In tables and CSV, control characters
    are escaped as in Python (``\\n``, ``\\x1b``), and a CSV cell that a spreadsheet would take for a formula begins
    with an apostrophe.

    Args:
        form: the format.
        stream: where to write.
        paths: all paths, which determine the width of the first column.
        classes: all classes, likewise.
    """
    if form == "jsonl":
        return lambda path, names, probabilities: print(
            json.dumps(
                {
                    "image": path,
                    "top": [
                        {"class": name, "probability": probability}
                        for name, probability in zip(names, probabilities, strict=True)
                    ],
                }
            ),
            file=stream,
        )
    if form == "csv":
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability"])
        return lambda path, names, probabilities: writer.writerows(
            [_cell(path), rank, _cell(name), f"{probability:.6g}"]
            for rank, (name, probability) in enumerate(zip(names, probabilities, strict=True), 1)
        )
    first = max((len(printable(path)) for path in paths), default=0)
    width = min(24, max(len(printable(name)) for name in classes))

    def write(path: str, names: Sequence[str], probabilities: Sequence[float]) -> None:
        cells = (
            f"{100 * probability:5.1f}%  {printable(name):<{width}}"
            for name, probability in zip(names, probabilities, strict=True)
        )
        print("  ".join([f"{printable(path):<{first}}", *cells]).rstrip(), file=stream)

    return write


def _cell(text: str) -> str:
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
