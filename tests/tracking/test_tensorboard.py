import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moa_train.tracking.pictures import confusion_picture, image_grid
from moa_train.tracking.tensorboard import TensorBoard


def load(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    accumulator.Reload()
    return accumulator


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    events = load(run_dir).Scalars(tag)
    steps = [event.step for event in events]
    assert steps == sorted(set(steps)), "steps are repeated or not in order"
    return {event.step: event.value for event in events}


def test_scalars(tmp_path: Path) -> None:
    logger = TensorBoard(tmp_path, 0, {})
    for step in range(0, 50, 10):
        logger.log_step(step, {"loss": step / 8, "lr": 1e-3, "grad_norm": 2.0, "none": None, "flag": True})
    logger.log_eval(40, {"top1": 62.5, "top1_count": 625, "total": 1000, "epoch": 2.0, "loss": 1.5, "best": True})
    loss = scalars(tmp_path, "loss/train")  # while it is still open
    assert loss == {step: step / 8 for step in range(0, 50, 10)}
    logger.close()
    assert load(tmp_path).Tags()["scalars"] == [
        "loss/train", "optimization/lr", "optimization/grad_norm", "accuracy/val_top1", "loss/val",
    ]  # fmt: skip
    assert scalars(tmp_path, "accuracy/val_top1") == {40: 62.5}


@pytest.mark.parametrize(("choice", "expected"), [("auto", []), ("test", ["accuracy/test_top1"])])
def test_a_split_that_is_evaluated_once_has_no_curve(tmp_path: Path, choice: str, expected: list[str]) -> None:
    logger = TensorBoard(tmp_path, 0, {"engine": {"eval_split": choice}})
    logger.log_images(0, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    logger.log_eval(40, {"top1": 62.5}, "test")
    logger.close()
    assert load(tmp_path).Tags()["scalars"] == expected


def test_nothing_is_opened_or_imported_before_the_first_event(tmp_path: Path) -> None:
    logger = TensorBoard(tmp_path, 0, {})
    logger.close()
    assert not (tmp_path / "tensorboard").exists()
    code = (
        "import sys, pathlib; from moa_train.tracking.tensorboard import TensorBoard; "
        "from moa_train.tracking.tracker import open_tracker; "
        "open_tracker(pathlib.Path(sys.argv[1]), total_steps=1, steps_per_epoch=1, loggers=[TensorBoard]); "
        "print([m for m in sys.modules if m.split('.')[0] == 'tensorboard' or 'matplotlib' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_images(tmp_path: Path) -> None:
    images_BCHW = torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logger = TensorBoard(tmp_path, 0, {})
    logger.log_images(7, images_BCHW)
    logger.close()
    (event,) = load(tmp_path).Images("train/input")
    assert event.step == 7
    picture = np.asarray(Image.open(BytesIO(event.encoded_image_string)))
    assert np.array_equal(picture, image_grid(images_BCHW).permute(1, 2, 0).numpy())


def test_captions_are_below_their_images() -> None:
    images = torch.full((3, 1, 8, 8), 90, dtype=torch.uint8)
    grid = image_grid(images, ["", "a class: 70%\nanother: 30%", "<b>\x1b[31m" + "long " * 30])
    side = 112
    assert grid.shape[0] == 3
    parts = [grid[:, 2:, 2 + (side + 2) * number :][:, :, :side] for number in range(3)]
    ink = []
    for part in parts:
        assert (part[:, :side] == 90).all()  # the image, enlarged
        ink.append(int((part[:, side:] < 128).sum()))
    assert ink[0] == 0
    assert min(ink[1:]) > 100
    assert (grid[:, :, -1] == 255).all()  # long captions are cut


@pytest.mark.parametrize("classes", [3, 30, 31, 400])
def test_confusion_matrix(tmp_path: Path, classes: int) -> None:
    counts = np.zeros((classes, classes), np.int64)
    counts[0, 0], counts[1, 1], counts[1, 2] = 5, 1, 3
    logger = TensorBoard(tmp_path, 0, {})
    logger.log_confusion(7, counts, [f"<i>class {number}" for number in range(classes)], "val")
    logger.close()
    (event,) = load(tmp_path).Images("val/confusion")
    picture = np.asarray(Image.open(BytesIO(event.encoded_image_string)))
    assert np.array_equal(
        picture, confusion_picture(counts, [f"<i>class {n}" for n in range(classes)]).permute(1, 2, 0)
    )
    side = 34 if classes <= 30 else max(1, 900 // classes)
    corner = np.array(picture.shape[:2]) - classes * side - 8

    def color(row: int, column: int) -> tuple[int, ...]:
        y, x = corner + side * np.array([row, column])
        return tuple(picture[y, x].tolist())

    assert color(0, 0) == (0, 114, 178)  # every image of this class is right
    assert color(0, 1) == (255, 255, 255)
    expected = 255 + 0.75**0.5 * (np.array([213, 94, 0]) - 255)
    assert np.abs(np.array(color(1, 2)) - expected).max() <= 1


@pytest.mark.parametrize(("count", "channels"), [(1, 3), (5, 3), (9, 1), (100, 3)])
def test_grid_by_loops(count: int, channels: int) -> None:
    height, width, gap, rows, columns = 5, 3, 2, 8, 8
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)
    grid = image_grid(images)
    shown = min(count, columns * rows)
    across = min(columns, shown)
    down = -(-shown // across)
    expected = np.full((channels, gap + down * (height + gap), gap + across * (width + gap)), 255, dtype=np.uint8)
    for i in range(shown):
        y, x = gap + i // across * (height + gap), gap + i % across * (width + gap)
        expected[:, y : y + height, x : x + width] = images[i].numpy()
    assert np.array_equal(grid.numpy(), expected)


def test_hyperparameters_with_the_final_metrics(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config: dict[str, Any] = {
        "optim": {"lr": 1e-3, "name": "adamw", "betas": [0.9, 0.99]},
        "compile": False,
        "root": None,
    }
    logger = TensorBoard(tmp_path, 0, config)
    logger.log_step(1, {"loss": 1.0})
    logger.close({"test_top1": 97.5, "test_top1_count": 975, "test_total": 1000, "text": "no number"})
    data = load(tmp_path).summary_metadata
    start = HParamsPluginData.FromString(data["_hparams_/session_start_info"].plugin_data.content)
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.session_start_info.hparams.items()}
    assert values == {
        "(final) test_top1": 97.5, "optim.lr": 1e-3, "optim.name": "adamw", "optim.betas": "[0.9, 0.99]",
        "compile": False, "root": "None",
    }  # fmt: skip
    assert min(values) == "(final) test_top1"  # TensorBoard shows the first five columns
    assert load(tmp_path).Tags()["scalars"] == ["loss/train"]


def test_an_unfinished_run_has_no_final_metrics(tmp_path: Path) -> None:
    logger = TensorBoard(tmp_path, 0, {"lr": 1.0})
    logger.log_step(1, {"loss": 1.0})
    logger.close()
    tags = load(tmp_path).Tags()
    assert (tags["scalars"], tags["tensors"]) == (["loss/train"], [])
    assert load(tmp_path).summary_metadata == {}


KILLED = """
import sys
from pathlib import Path
from moa_train.tracking.tensorboard import TensorBoard
run_dir, first = Path(sys.argv[1]), int(sys.argv[2])
logger = TensorBoard(run_dir, first, {})
for step in range(first, 10**9):
    logger.log_step(step, {"loss": float(step)})
    print(step, flush=True)
"""


def test_sigkill_while_writing_then_resume(tmp_path: Path) -> None:
    """A kill loses nothing that was logged, and after each resume, steps have no repetitions and no gaps."""
    first = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(first)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        while int(process.stdout.readline()) < first + 30:
            pass
        os.kill(process.pid, signal.SIGKILL)
        logged = [int(line) for line in process.stdout.read().splitlines() if line]
        process.wait()
        process.stdout.close()
        last = max([*logged, first + 30])
        loss = scalars(tmp_path, "loss/train")
        assert list(loss)[: last + 1] == list(range(last + 1))
        assert all(value == step for step, value in loss.items())
        first = last - 10
    logger = TensorBoard(tmp_path, first, {})
    logger.log_step(first, {"loss": -1.0})
    logger.close()
    loss = scalars(tmp_path, "loss/train")
    assert list(loss) == list(range(first + 1))
    assert loss[first] == -1.0


def test_setting_the_clock_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for first, day in ((0, 0), (8, -1), (15, -2), (15, -2)):
        monkeypatch.setattr(time, "time", lambda day=day: now + 86_400 * day)
        logger = TensorBoard(tmp_path, first, {})
        for step in range(first, first + 10):
            logger.log_step(step, {"loss": float(step)})
        logger.close()
    assert scalars(tmp_path, "loss/train") == {step: float(step) for step in range(25)}
