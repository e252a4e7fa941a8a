"""Curves of runs from their metrics.jsonl, drawn by matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_train.runtime.errors import UserError
from moa_train.tracking.jsonl import Row, read_rows

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""The colors of Okabe and Ito, which color-blind readers can distinguish."""


@dataclass(frozen=True)
class Curves:
    """The training rows of one run, and its evaluation rows of one split."""

    name: str
    train: list[Row]
    evaluations: list[Row]
    split: str

    @classmethod
    def read(cls, run_dir: Path) -> "Curves":
        """Read a run folder and choose the split that was evaluated most often.

        Raises:
            UserError: there is no metrics.jsonl, or it has no rows.
        """
        path = run_dir / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{run_dir} is not a run folder: it has no metrics.jsonl.")
        rows = read_rows(path)
        splits = [row["split"] for row in rows if row.get("kind") == "eval"]
        split = max(dict.fromkeys(splits), key=splits.count) if splits else "none"
        train = [row for row in rows if row.get("kind") == "train"]
        evaluations = [row for row in rows if row.get("kind") == "eval" and row["split"] == split]
        if not train and not evaluations:
            raise UserError(f"{path} has no rows yet.")
        return cls(run_dir.resolve().name, train, evaluations, split)


def draw_loss(axes: Any, runs: Sequence[Curves]) -> None:
    """Draw the losses of runs over epochs onto axes of matplotlib."""
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        axes.plot(*_points(run.train, "loss"), color=color, linewidth=1, alpha=0.45)
        axes.plot(*_points(run.evaluations, "loss"), color=color, linewidth=1.8, marker=_dot(run))
    axes.plot([], [], color="0.4", linewidth=1, alpha=0.45, label="train (augmented)")
    axes.plot([], [], color="0.4", linewidth=1.8, label=_splits(runs))
    _finish(axes, "loss (nats)", "upper right")  # away from falling curves


def draw_accuracy(axes: Any, runs: Sequence[Curves]) -> None:
    """Draw the top-1 accuracies of runs over epochs onto axes of matplotlib."""
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        label = _label(run).replace("$", r"\$")  # otherwise, dollar signs would delimit formulas
        axes.plot(*_points(run.evaluations, "top1"), color=color, linewidth=1.8, marker=_dot(run), label=label)
    axes.set_ylim(bottom=0)
    _finish(axes, f"top-1 on {_splits(runs)} (%)", "lower right")  # away from rising curves


def _finish(axes: Any, title: str, legend: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("epoch")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc=legend)


def _dot(run: Curves) -> str | None:
    return "o" if len(run.evaluations) == 1 else None  # a line through one point is invisible


def _splits(runs: Sequence[Curves]) -> str:
    return " or ".join(sorted({run.split for run in runs}))


def _points(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Return the epochs, or steps if rows have no epoch, and values of the rows that have a value for ``key``."""
    present = [row for row in rows if row.get(key) is not None]
    return [row["epoch" if "epoch" in row else "step"] for row in present], [row[key] for row in present]


def _label(run: Curves) -> str:
    _, values = _points(run.evaluations, "top1")
    return f"{run.name}: best {max(values):.2f}%" if values else run.name
