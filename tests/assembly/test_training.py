"""The initial state of a run."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from moa_train.assembly import training
from moa_train.assembly.training import build_compiled, load_init
from moa_train.engine.tensorfile import write_tensors
from moa_train.model.registry import create_model
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig, image_shape
from moa_train.serialization import to_dict


def build(config: RunConfig) -> nn.Module:
    return create_model(config.model, image_size=image_shape(config.data.image_size), num_classes=10)


@pytest.mark.parametrize(
    ("choice", "device", "steps", "works", "mode"),
    [
        ("auto", "cuda", 2000, True, "blocks"),
        ("auto", "cuda", 1999, True, None),  # not worth it
        ("auto", "cuda", 2000, False, None),  # no compiler
        ("auto", "cpu", 2000, True, None),
        ("blocks", "cpu", 1, True, "blocks"),
        (True, "cuda", 1, True, "model"),
        ("false", "cuda", 9999, True, None),
    ],
)
def test_what_is_compiled_when(tiny, monkeypatch, choice, device, steps, works, mode):
    monkeypatch.setattr(training, "compiles", lambda device: works)
    monkeypatch.setattr(training, "compile_model", lambda model, mode, purpose: (mode, purpose))
    config = tiny({"runtime.deterministic": "false"})
    config.runtime.compile, config.runtime.compile_for = choice, "max-autotune"
    model = build(config)
    assert build_compiled(config, model, steps, torch.device(device)) == ((mode, "max-autotune") if mode else model)
    if choice == "auto":
        config.runtime.deterministic = True
        assert build_compiled(config, model, steps, torch.device(device)) is model


def test_the_error_for_unsuitable_weights_lists_the_settings_of_their_model(tiny, tmp_path: Path):
    theirs = tiny({"model.depths": "[1,2]", "model.moa.overlap": "0", "model.drop_path": "0.3"})
    weights = build(theirs).state_dict()
    path = tmp_path / "theirs.safetensors"
    write_tensors(path, weights, {"config": json.dumps(to_dict(theirs))})

    ours = tiny()
    model = build(ours)
    with pytest.raises(UserError, match=r"unexpected: layers\.1\.blocks\.1") as caught:
        load_init(model, path, ours)
    assert str(caught.value).endswith("\nThe weights' own model has model.depths=[1,2] model.moa.overlap=0.")

    # With the settings from the message, they fit.
    matching = tiny({"model.depths": "[1,2]", "model.moa.overlap": "0"})
    model = build(matching)
    load_init(model, path, matching)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_weights_of_torchvisions_models_fit(tiny, tmp_path: Path):
    theirs = dict(resnet50(num_classes=10).state_dict())
    torch.save(theirs, tmp_path / "new.pth")
    counters = {name for name in theirs if name.endswith("num_batches_tracked")}
    torch.save({name: value for name, value in theirs.items() if name not in counters}, tmp_path / "old.pth")
    config = tiny({"model.name": "resnet", "model.embed_dim": 64, "model.depths": "[3,4,6,3]", "model.patch_size": 4})
    config.model.dropout = config.model.drop_path = 0.0
    for name in ("new.pth", "old.pth"):
        model = build(config)
        load_init(model, tmp_path / name, config)
        assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    theirs.pop("layer1.0.bn1.weight")
    torch.save(theirs, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match=r"missing: layer1\.0\.bn1\.weight"):
        load_init(model, tmp_path / "damaged.pth", config)


def test_the_classifier_of_other_classes_is_refused(straight, tiny):
    config = tiny()
    model, classes = build(config), [str(digit) for digit in range(10)]
    load_init(model, straight, config, classes)
    with pytest.raises(UserError, match=r"(?s)first difference is '9'.*init_head=new"):
        load_init(model, straight, config, classes[::-1])
    config.init_head = "new"
    load_init(model, straight, config, classes[::-1])


def test_old_names_of_published_vits_are_known(tiny, tmp_path):
    config = tiny({"model.name": "vit", "model.depths": "[2]", "model.heads": "[2]", "model.drop_path": 0})
    weights = build(config).state_dict()
    old = {name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
           for name, value in weights.items()}  # fmt: skip
    assert old.keys() != weights.keys()
    torch.save(old, tmp_path / "vit.pth")
    model = build(config)
    load_init(model, tmp_path / "vit.pth", config)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
