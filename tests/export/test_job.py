"""An export appears only if it is complete and agrees with the checkpoint."""

import io
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from moa_train.assembly.trained import Trained
from moa_train.engine.tensorfile import write_tensors
from moa_train.export.job import FORMATS, staged
from moa_train.export.subject import Deployed, Subject, draw
from moa_train.runtime.errors import UserError
from moa_train.schema import ExportConfig


def test_an_existing_output_is_never_replaced(learned, export, tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UserError, match=r"x exists already\. Remove it, or choose another path with output="):
        export(ckpt=learned, format="safetensors", output=tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


def test_missing_folders_and_checkpoints_are_errors(learned, export, tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        export(ckpt=learned, format="safetensors", output=tmp_path / "nowhere" / "x")
    with pytest.raises(UserError, match="contains no checkpoint"):
        export(ckpt=tmp_path, format="safetensors", output=tmp_path / "x")
    with pytest.raises(UserError, match=r"root=|does not exist"):
        export(ckpt=learned, format="safetensors", output=tmp_path / "x", split="val", root=tmp_path / "elsewhere")


@pytest.mark.parametrize("form", ["safetensors", "hub", "torch_export"])
def test_a_full_disk_is_reported_and_leaves_nothing(learned, export, tmp_path, form):
    """A limit on the size of files makes writes fail in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"x cannot be written: File too large\. Free some space"):
            export(ckpt=learned, format=form, output=tmp_path / "x", license="mit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_nothing(tmp_path):
    def fail() -> None:
        with staged(tmp_path / "x") as path:
            path.mkdir()
            (path / "half").write_text("")
            raise UserError("the exported file does not agree")

    with pytest.raises(UserError, match="does not agree"):
        fail()
    assert not list(tmp_path.iterdir())


def subject(learned, **settings) -> Subject:
    config, trained = ExportConfig(**settings), Trained.open(learned)
    return Subject(config, trained, trained.config, trained.open_split("test"), io.StringIO())


def test_one_wrong_answer_more_fails_the_export(learned, logged):
    checked = subject(learned)
    same = checked.agreement(checked.reference)
    assert same["top1_count"] == logged["top1_count"]
    assert (same["largest_difference"], same["different_answers"]) == (0, 0)
    logits = checked.reference.copy()
    first = int(np.flatnonzero(checked.ranks(logits) == 0)[0])
    logits[first, checked.labels[first]] -= 100
    count = logged["top1_count"]
    found = rf"classifies {count - 1} of 359 images correctly.*checkpoint {count};.* is 100"
    with pytest.raises(UserError, match=found) as error:
        checked.agreement(logits)
    assert "seed=, with a smaller images= if all" in str(error.value)  # a seed alone would draw the same images


class Branches(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.sum((2, 3))


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_a_model_that_torch_cannot_export_is_an_error_that_names_another_format(learned, tmp_path, form):
    module = pytest.importorskip(f"moa_train.export.{FORMATS[form][0]}")
    failing = subject(learned)
    failing.__dict__["model"] = Deployed(Branches(), failing.run.data)
    with pytest.raises(UserError, match=r"torch cannot export .* \(.*[Dd]ata-dependent.*\)\. .* format=safetensors"):
        module.write(failing, tmp_path / "x")


def test_images_are_drawn_by_seed_without_repetition(learned):
    source = Trained.open(learned).open_split("test")
    rows = [draw(source, 100, seed).rows.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert len(set(rows[0])) == 100
    assert draw(source, 359, 0) is source


def test_the_default_output_is_next_to_the_weights(best, export, tmp_path):
    write_tensors(tmp_path / "mine.safetensors", *best)
    report = export(ckpt=tmp_path / "mine.safetensors", format="safetensors", images=50)
    assert report["output"] == str(tmp_path / "export" / "model.safetensors")
    assert report["bytes"] == (tmp_path / "export" / "model.safetensors").stat().st_size
    assert report["agreement"]["total"] == 50


def test_the_command_prints_only_json(learned, tmp_path):
    command = [sys.executable, "-m", "moa_train.cli.export"]
    done = subprocess.run(
        [*command, f"ckpt={learned}", "format=safetensors", f"output={tmp_path}/x"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["agreement"]["total"] == 359
    assert "wrote" in done.stderr
    assert "largest difference between logits: 0" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: ckpt is missing. Give ckpt=PATH" in done.stderr
