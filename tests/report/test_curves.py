import re
from pathlib import Path

import pytest

from moa_train.report.curves import Curves
from moa_train.runtime.errors import UserError
from moa_train.tracking.jsonl import JsonLines


def make_run(folder: Path, evaluations: int = 40) -> Path:
    folder.mkdir()
    logger = JsonLines(folder / "metrics.jsonl")
    for epoch in range(1, evaluations + 1):
        logger.log_step(5 * epoch, {"epoch": epoch, "loss": 4 / (1 + epoch)})
        logger.log_eval(5 * epoch, {"epoch": epoch, "loss": 3 / epoch, "top1": 90.0 - (epoch - 30) ** 2 / 20}, "val")
    logger.log_eval(5 * evaluations, {"top1": 80.0}, "test")
    logger.close()
    return folder


def heights(path: str) -> list[float]:
    """Return the y coordinates of a path of an SVG, which grow downward."""
    return [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = Curves.read(make_run(tmp_path / "run"))
    assert (len(curves.train), len(curves.evaluations), curves.split) == (40, 40, "val")
    loss, accuracy = curves.plots()
    assert "train (augmented)" in loss
    assert "top-1 on val (%)" in accuracy
    assert "best 90.00%" in accuracy
    lines = [heights(path) for path in re.findall(r'<path d="([^"]*)"[^>]*stroke: #0072b2', accuracy)]
    line = max(lines, key=len)
    assert min(line) < line[-1] < line[0]  # rises to the best evaluation, and falls after it


def test_a_single_evaluation_is_visible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one, two = (Curves.read(make_run(tmp_path / str(count), count)).plots()[1] for count in (1, 2))
    assert one.count("<use ") > two.count("<use ")  # a marker


def test_without_epochs_or_finite_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    logger = JsonLines(tmp_path / "metrics.jsonl")
    logger.log_step(1, {"loss": float("nan")})
    logger.close()
    assert len(Curves.read(tmp_path).plots()) == 1
    logger = JsonLines(tmp_path / "metrics.jsonl", first_step=2)
    logger.log_eval(2, {"loss": 1.0}, "val")  # without top1
    logger.close()
    assert len(Curves.read(tmp_path).plots()) == 1


def test_folders_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        Curves.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows yet"):
        Curves.read(tmp_path)
