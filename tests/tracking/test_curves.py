import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa_train.runtime.errors import UserError
from moa_train.tracking.curves import Curves, draw, main, table
from moa_train.tracking.jsonl import JsonLines


def make_run(folder: Path, epochs: int = 40) -> Path:
    folder.mkdir()
    logger = JsonLines(folder / "metrics.jsonl")
    for step in range(1, 10 * epochs + 1):
        epoch = step / 10
        if step % 5 == 0:
            logger.log_step(step, {"epoch": epoch, "loss": 4 / (1 + epoch)})
        if step % 10 == 0:
            top1 = 90.0 - (epoch - 30) ** 2 / 20  # best at 30
            logger.log_eval(step, {"epoch": epoch, "loss": 3 / epoch, "top1": top1, "top5": 95.0}, "val")
    logger.log_eval(10 * epochs, {"top1": 80.0}, "test")
    logger.close()
    return folder


def test_table(tmp_path: Path) -> None:
    assert table(Curves.read(make_run(tmp_path / "run")), most=5).splitlines() == [
        "| epoch | step | train loss | val loss | top-1 (%) | top-5 (%) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 1 | 10 | 2.0000 | 3.0000 | 47.95 | 95.00 |",
        "| 11 | 110 | 0.3333 | 0.2727 | 71.95 | 95.00 |",
        "| 21 | 210 | 0.1818 | 0.1429 | 85.95 | 95.00 |",
        "| 30 | 300 | 0.1290 | 0.1000 | **90.00** | 95.00 |",
        "| 40 | 400 | 0.0976 | 0.0750 | 85.00 | 95.00 |",
    ]


def test_table_has_first_last_and_best(tmp_path: Path) -> None:
    text = table(Curves.read(make_run(tmp_path / "run")))
    steps = [int(line.split("|")[2]) for line in text.splitlines()[2:]]
    assert steps[0] == 10
    assert steps[-1] == 400
    assert 300 in steps
    assert len(steps) <= 13


def test_runs_without_evaluations_or_losses(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    logger = JsonLines(folder / "metrics.jsonl")
    logger.log_step(1, {"loss": float("nan")})
    logger.close()
    assert table(Curves.read(folder)) == "run: no evaluations."


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [Curves.read(make_run(tmp_path / name)) for name in ("first", "second")]
    draw(runs, tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3)
    assert len(picture) == 1500 * 600
    assert 0.02 < np.mean(picture.min(axis=1) < 200) < 0.3  # mostly white, not all white


def test_a_single_evaluation_is_visible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "run").mkdir()
    logger = JsonLines(tmp_path / "run" / "metrics.jsonl")
    logger.log_eval(8, {"epoch": 1.0, "loss": 2.0, "top1": 50.0}, "test")
    logger.close()
    draw([Curves.read(tmp_path / "run")], tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    height, width, _ = picture.shape
    top_right = picture[: height // 2, width // 2 :]  # the legend has the same color but is below
    assert (np.abs(top_right - (0, 0x72, 0xB2)).max(axis=-1) < 10).sum() > 20


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_run(tmp_path / "run"))]) == 0
    assert capsys.readouterr().out.startswith("run\n\n| epoch |")
    assert main([str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows yet"):
        Curves.read(tmp_path)


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        f"from moa_train.tracking.curves import main; sys.exit(main([{str(run)!r}, '--png', 'x.png']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "Drawing curves needs matplotlib: pip install 'moa-train[plot]'.\n")
