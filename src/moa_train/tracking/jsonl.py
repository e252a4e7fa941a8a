"""metrics.jsonl: one JSON object per line, complete and without repeated steps after any kill."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from moa_train.runtime.files import file_type, write_all, write_whole, writing
from moa_train.tracking.logger import Logger, Metrics

log = logging.getLogger(__name__)

MACHINE_FIELDS = frozenset({"seconds", "images_per_second", "memory"})
"""Fields that depend on the machine. All others are the same in every repetition of a deterministic run."""

Row = dict[str, Any]


class JsonLines(Logger):
    """Append rows ``{"kind": "train" | "eval", "step": n, ...}``, each passed to the operating system immediately.

    Opening the file drops the rows of ``first_step`` and later, which a resumed training is about to write again, and a
    partial last line.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        with writing(path):
            if file_type(path) is not None:
                rows = (row for row in read_rows(path) if row["step"] < first_step)
                write_whole(path, "".join(f"{json.dumps(row)}\n" for row in rows))
            self._file = path.open("ab", buffering=0)  # unbuffered: after a failed write, closing has nothing to write

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Append a row of kind ``train``."""
        self._write(make_row("train", step, metrics))

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Append a row of kind ``eval``."""
        self._write(make_row("eval", step, metrics, split=split))

    def close(self, final: Metrics | None = None) -> None:
        """Close the file. A quota may report only now that it is exceeded."""
        with writing(self.path):
            self._file.close()

    def _write(self, row: Row) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with writing(self.path):
            write_all(self._file.fileno(), line)


def make_row(kind: str, step: int, metrics: Metrics, **fields: str) -> Row:
    """Return a row for JSON, which has no NaN and no infinity: both become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    return {"kind": kind, "step": step, **fields, **finite}


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl, which another process may be writing. A partial last line is skipped."""
    *lines, _partial = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _decode(line)
        if row is None:
            log.warning("%s: line %d is damaged. It is skipped.", path, number)
        else:
            rows.append(row)
    return rows


def _decode(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {"lr" if key == "rate" else key: value for key, value in row.items()}  # "rate" is the former name
