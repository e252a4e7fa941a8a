"""metrics.jsonl: one JSON object a line; complete and without repeated steps after any kill."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moa_train.runtime.files import file_type, write_all, write_flushed
from moa_train.tracking.writers import Metrics, Writer, writing

log = logging.getLogger(__name__)

# Measures of the machine. All other fields are the same in every repetition of a deterministic run.
MACHINE_FIELDS = frozenset({"seconds", "images_per_second", "memory"})

Row = dict[str, Any]


class JsonLines(Writer):
    """Appends rows ``{"kind": "train" | "eval", "step": n, ...}``; each is handed to the system at once.

    When opened, rows of ``first_step`` and later, which a resumed training is about to write again, are dropped
    together with a half-written line. Not-a-number and infinity become null.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        with writing(path):
            _rewind(path, first_step)
            self._file = path.open("ab", buffering=0)  # nothing is left to write when a write has failed

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Append a row of kind ``train``."""
        self._write({"kind": "train", "step": step, **metrics})

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Append a row of kind ``eval``."""
        self._write({"kind": "eval", "step": step, "split": split, **metrics})

    def close(self, final: Metrics | None = None) -> None:
        """Close the file; a quota may report only here that it is exceeded."""
        with writing(self.path):
            self._file.close()

    def _write(self, row: Row) -> None:
        with writing(self.path):
            write_all(self._file.fileno(), _encode(row).encode() + b"\n")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a metrics.jsonl, which may still be written to: an unfinished last line is left out."""
    return list(_rows(path))


def _encode(row: Row) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False)


def _rows(path: Path) -> Iterator[Row]:
    *lines, _unfinished = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _decode(line)
        if row is None:
            log.warning("%s: line %d is damaged and left out.", path, number)
        else:
            yield row


def _decode(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _rewind(path: Path, first_step: int) -> None:
    """Replace the file atomically by one that holds only the rows before ``first_step``."""
    if file_type(path) is None:
        return
    partial = path.with_name(path.name + ".partial")
    kept = "".join(_encode(row) + "\n" for row in _rows(path) if row["step"] < first_step)
    write_flushed(partial, kept.encode())
    partial.replace(path)
