"""Curves of a run from its metrics.jsonl."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_train.report.plots import COLORS, svg
from moa_train.runtime.errors import UserError
from moa_train.tracking.jsonl import Row, read_rows


@dataclass(frozen=True)
class Curves:
    """The training rows of a run, and its evaluation rows of one split."""

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
        return cls(train, evaluations, split)

    def plots(self) -> list[str]:
        """Return the loss and, if it was evaluated, the top-1 accuracy over epochs, as SVG elements."""

        def loss(axes: Any) -> None:
            _draw(axes, self.train, "loss", linewidth=1, alpha=0.45, label="train (augmented)")
            _draw(axes, self.evaluations, "loss", linewidth=1.8, label=self.split)
            _finish(axes, "loss (nats)", "upper right")  # away from falling curves

        values = _points(self.evaluations, "top1")[1]

        def accuracy(axes: Any) -> None:
            _draw(axes, self.evaluations, "top1", linewidth=1.8, label=f"best {max(values):.2f}%")
            axes.set_ylim(bottom=0)
            _finish(axes, f"top-1 on {self.split} (%)", "lower right")  # away from rising curves

        accuracies = [svg(accuracy, "Accuracy during training")] if values else []
        return [svg(loss, "Loss during training"), *accuracies]


def _draw(axes: Any, rows: list[Row], key: str, **style: Any) -> None:
    marker = "o" if len(rows) == 1 else None  # a line through one point is invisible
    axes.plot(*_points(rows, key), color=COLORS[0], marker=marker, **style)


def _points(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    """Return the epochs, or steps if rows have no epoch, and values of the rows that have a value for ``key``."""
    present = [row for row in rows if row.get(key) is not None]
    return [row["epoch" if "epoch" in row else "step"] for row in present], [row[key] for row in present]


def _finish(axes: Any, title: str, legend: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("epoch")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc=legend)
