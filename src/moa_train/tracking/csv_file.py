"""metrics.csv: the rows of metrics.jsonl as one table, for spreadsheets and pandas."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa_train.runtime.files import write_all, write_whole, writing
from moa_train.tracking.jsonl import Row, make_row, read_rows
from moa_train.tracking.logger import Logger, Metrics


class CsvFile(Logger):
    """Append every row to ``metrics.csv``. A cell is empty if the row has no such value.

    The file is rewritten from metrics.jsonl when it is opened and when a row has a new column. A resumed run therefore
    continues with the right columns, without repeated steps and without the partial line that a kill may leave.
    """

    def __init__(self, run_dir: Path, first_step: int, config: Mapping[str, Any]) -> None:
        self._rows, self._path = run_dir / "metrics.jsonl", run_dir / "metrics.csv"
        self._rewrite()

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Append a row of kind ``train``."""
        self._append(make_row("train", step, metrics))

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Append a row of kind ``eval``."""
        self._append(make_row("eval", step, metrics, split=split))

    def _append(self, row: Row) -> None:
        if not row.keys() <= set(self._columns):
            self._rewrite()  # metrics.jsonl holds this row already
            return
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        with writing(self._path), self._path.open("ab", buffering=0) as file:
            write_all(file.fileno(), line.getvalue().encode())

    def _rewrite(self) -> None:
        rows, text = read_rows(self._rows), io.StringIO()
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, text.getvalue() if rows else "")
