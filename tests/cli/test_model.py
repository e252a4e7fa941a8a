"""The moa-model command: the summary, and conversion of published weights in both directions."""

import json
import re
import resource
import sys
from pathlib import Path

import pytest
import torch

from moa_train.cli import model as command
from moa_train.engine.find_weights import find_weights
from moa_train.model.pth_file import read_state_dict
from moa_train.model.registry import create_model
from moa_train.schema import MoaConfig, ModelConfig
from moa_train.serialization import from_dict

SIZE, CLASSES = (56, 56), 5
CONFIG = ModelConfig(patch_size=4, embed_dim=32, depths=[1, 1], heads=[1, 2], window=7, moa=MoaConfig(form="published"))


class Foreign:
    """An object of a class that does not exist in this project, such as a configuration in a published file."""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.pth"
    torch.save(
        {
            "model": create_model(CONFIG, image_size=SIZE, num_classes=CLASSES).state_dict(),
            "config": Foreign(),
            "epoch": 7,
        },
        path,
    )
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moa-model", *arguments])
    with pytest.raises(SystemExit) as left:
        command.main()
    return int(left.value.code or 0)


def test_converting_published_weights_and_back_changes_no_bit(published: Path, monkeypatch: pytest.MonkeyPatch):
    ours, back = published.with_name("ours.safetensors"), published.with_name("back.pth")
    assert run(monkeypatch, "convert", str(published), str(ours)) == 0
    assert run(monkeypatch, "convert", str(ours), str(back)) == 0
    before, after = read_state_dict(published), read_state_dict(back)
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_conversion_that_fails_leaves_the_old_file(published: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    ours, back, broken = (published.with_name(name) for name in ("x.safetensors", "back.pth", "broken.safetensors"))
    assert run(monkeypatch, "convert", str(published), str(ours)) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for source, target in ((published, broken), (ours, back)):
        target.write_text("old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            assert run(monkeypatch, "convert", str(source), str(target)) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f"{target} cannot be written: File too large" in capsys.readouterr().err
        assert target.read_text() == "old"
    assert sorted(published.parent.iterdir()) == sorted([published, ours, back, broken])


def test_converted_weights_contain_their_configuration(published: Path, monkeypatch: pytest.MonkeyPatch):
    ours = published.with_name("ours.safetensors")
    run(monkeypatch, "convert", str(published), str(ours))
    _, metadata = find_weights(ours).load()
    config = from_dict(json.loads(metadata["config"]))
    assert (config.model.moa.form, config.model.window, config.model.depths) == ("published", 7, [1, 1])
    assert config.data.image_size == [56, 56]
    assert len(json.loads(metadata["classes"])) == 5


def test_files_that_are_not_checkpoints_are_rejected(tmp_path: Path, monkeypatch, capsys):
    text = tmp_path / "notes.pth"
    text.write_text("no checkpoint")
    assert run(monkeypatch, "convert", str(text), str(tmp_path / "x.safetensors")) == 2
    assert "notes.pth" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ours.pt", "published.pth can be converted to ours.safetensors, but not to ours.pt"),
        ("other.pth", "can be converted to other.safetensors"),
        ("nowhere/ours.safetensors", "does not exist"),
    ],
)
def test_an_invalid_target_is_rejected_before_anything_is_written(published, monkeypatch, capsys, target, message):
    assert run(monkeypatch, "convert", str(published), str(published.parent / target)) == 2
    assert message in capsys.readouterr().err
    assert list(published.parent.iterdir()) == [published]


def test_summary_of_the_configured_model(monkeypatch, capsys):
    assert run(monkeypatch, "summary", "engine.micro_batch_size=2", "engine.batch_size=2") == 0
    text = capsys.readouterr().out
    assert "moa_micro at 32 x 32, 10 classes" in text
    assert "MOA" in text
    assert "memory of a training step of 2 images" in text


def test_the_summary_includes_the_memory_of_ema_weights(monkeypatch, capsys):
    found = []
    for decay in ("0", "0.99"):
        run(monkeypatch, "summary", "model.embed_dim=1024", "engine.batch_size=1", f"engine.ema_decay={decay}")
        text = capsys.readouterr().out
        weights = int(re.search(r"total +([\d,]+)", text)[1].replace(",", "")) * 4 / 2**30
        found.append(float(re.search(r"about ([\d.]+) GiB", text)[1]))
    assert found[1] - found[0] == pytest.approx(weights, abs=0.011)
    assert weights > 0.5


def test_unknown_command(monkeypatch, capsys):
    assert run(monkeypatch, "sumary") == 2
    assert "Commands: summary, convert." in capsys.readouterr().err


def test_a_summary_for_several_gpus_says_what_limits_a_step(monkeypatch: pytest.MonkeyPatch, capsys):
    setting = [
        "summary",
        "--gpus",
        "8",
        "data=cifar10",
        "model.embed_dim=32",
        "model.depths=[1,1]",
        "model.heads=[1,2]",
    ]
    shown = {}
    for batch in (64, 2097152):
        assert run(monkeypatch, *setting, f"engine.batch_size={batch}") == 0
        shown[batch] = capsys.readouterr().out
    assert "8 GPUs: 64 images per update are 8 per GPU" in shown[64]
    assert "The host limits this step" in shown[64]
    assert "The device limits this step" in shown[2097152]
    operations = {re.search(r"about ([\d,]+) operations", text)[1] for text in shown.values()}
    assert len(operations) == 1  # they do not depend on the batch


def test_a_summary_for_no_gpus_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    assert run(monkeypatch, "summary", "--gpus", "many") == 2
    assert "--gpus many must be followed by the number of GPUs" in capsys.readouterr().err
