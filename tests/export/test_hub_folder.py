"""Folders for a model hub and single weights files are read back by moa-eval, init= and timm."""

import io
import json
import re
import shlex

import numpy as np
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors import safe_open

import moa_train
from moa_train.assembly.trained import Trained
from moa_train.assembly.training import load_init
from moa_train.cli.compose import addable
from moa_train.cli.evaluate import evaluate
from moa_train.cli.train import with_overrides
from moa_train.engine.tensorfile import write_tensors
from moa_train.export.hub_folder import card
from moa_train.export.subject import Subject
from moa_train.knobs import knobs
from moa_train.model.registry import create_model
from moa_train.runtime.errors import UserError
from moa_train.runtime.seed import set_deterministic
from moa_train.schema import EvalConfig, ExportConfig, RunConfig
from moa_train.serialization import to_dict


def evaluation(path, output, capsys) -> dict:
    capsys.readouterr()
    try:
        evaluate(EvalConfig(ckpt=str(path), device="cpu", output=str(output)), [])
    finally:
        set_deterministic(False)
    return json.loads(capsys.readouterr().out)


def fixed(config):
    """Yield the settings of the architecture."""
    yield from ((key, value) for key, item, value in knobs(config.model) if item.metadata["fixed"])


@pytest.mark.parametrize("form", ["safetensors", "hub"])
def test_moa_eval_and_init_read_it_back(exported, best, logged, form, tmp_path, capsys):
    path = exported(form)[0]
    found = evaluation(path, tmp_path / "x.json", capsys)
    names = ("top1_count", "top5_count", "total", "loss")
    assert {name: found[name] for name in names} == {name: logged[name] for name in names}
    config = Trained.open(path).config
    model = create_model(config.model, image_size=(32, 32), num_classes=10)
    load_init(model, path, config)
    assert {name: value for name, value in model.state_dict().items() if name not in best[0]} == {}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in best[0].items())


def test_the_header_has_preprocessing_and_classes(exported):
    with safe_open(exported("safetensors")[0], "pt") as file:
        header = {name: json.loads(value) for name, value in file.metadata().items()}
    assert header["preprocessing"]["size"] == [32, 32]
    assert len(header["preprocessing"]["mean"]) == 3
    words = "orientation tags of image files are ignored; 16-bit gray is scaled to 8 bits"
    assert (header["preprocessing"]["decode"], header["preprocessing"]["range"]) == (words, None)
    assert header["classes"] == [str(digit) for digit in range(10)]
    assert len(header["test_vectors"]) == 3


def test_the_model_card_has_measured_numbers_and_commands(exported, logged, learned):
    path = exported("hub")[0]
    assert sorted(file.name for file in path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    _, front, text = (path / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "mit"
    metrics = {metric["name"]: metric["value"] for metric in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"top-1": round(logged["top1"], 2), "top-5": round(logged["top5"], 2)}
    assert f"| {logged['top1']:.2f}% ({logged['top1_count']}) |" in text
    origin = json.loads((learned / "provenance.json").read_text())
    assert origin[0]["command"].split()[-1] in text
    init = re.search(r"^moa-train (init=FOLDER.*)$", text, re.MULTILINE)[1]
    settings = [setting for setting in shlex.split(init) if setting.startswith("model.")]
    ours, theirs = (
        dict(fixed(config)) for config in (with_overrides(RunConfig(), settings), Trained.open(path).config)
    )
    assert ours == theirs
    assert json.loads((path / "config.json").read_text())["num_classes"] == 10


def test_weights_of_an_own_data_set_need_no_module_of_it(exported, learned, tmp_path):
    """The header holds the mean and the standard deviation, which are all that predictions need of it."""
    with safe_open(exported("safetensors")[0], "pt") as file:
        header, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(header["config"])
    config["data"]["name"] = "missing_package.pens:Pens"
    write_tensors(tmp_path / "x.safetensors", weights, header | {"config": json.dumps(config)})
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    found = moa_train.load(tmp_path / "x.safetensors", device="cpu", code="missing_package").logits(image)
    assert torch.equal(found, moa_train.load(learned, device="cpu").logits(image))


def test_a_second_export_replaces_the_record_of_the_first(exported, export, tmp_path):
    export(ckpt=exported("safetensors")[0], format="safetensors", output=tmp_path / "x", images=50)
    with safe_open(tmp_path / "x", "pt") as file:
        assert json.loads(file.metadata()["evaluation"])["total"] == 50


def test_the_commands_of_the_card_allow_own_code(learned):
    trained = Trained.open(learned)
    trained.config.loss.name, trained.config.data.range = "my_package.losses:focal", [0.0, 4095.0]
    source = trained.open_split("test")
    text = card(Subject(ExportConfig(license="mit"), trained, trained.config, source, io.StringIO()), None)
    assert "moa-eval ckpt=FOLDER root=DATA 'code=[my_package]'    #" in text
    assert 'moa_train.load("FOLDER", code=["my_package"])' in text
    assert "RGB; gray of more than 8 bits is scaled to 8 bits: 0 becomes 0 and 4095 becomes 255. Resize" in text


def test_a_license_is_required(learned, export, tmp_path):
    with pytest.raises(UserError, match=r"format=hub requires license=ID"):
        export(ckpt=learned, format="hub", output=tmp_path / "x")


def test_a_checkpoint_without_a_manifest_is_no_folder_of_a_hub(learned, tmp_path):
    for file in (learned / "checkpoints" / "best").iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="contains no checkpoint"):
        Trained.open(tmp_path)


def random_weights(tiny, path, **model) -> RunConfig:
    """Write a weights file of an untrained model for the digits."""
    config = tiny({"data.limit": 64})
    for key, value in model.items():
        setattr(config.model, key, value)
    torch.manual_seed(0)
    built = create_model(config.model, image_size=(32, 32), num_classes=10)
    header = {"config": json.dumps(to_dict(config)), "classes": json.dumps([str(digit) for digit in range(10)])}
    write_tensors(path, built.state_dict(), header)
    return config


@pytest.mark.parametrize(
    ("architecture", "model"),
    [
        ("test_vit", {"name": "timm", "variant": "test_vit", "args": {"kwargs": {"depth": 2}}}),
        ("test_resnet", {"name": "timm", "variant": "test_resnet"}),
        ("resnet50", {"name": "resnet", "depths": [3, 4, 6, 3], "patch_size": 4, "embed_dim": 64}),
    ],
)
def test_timm_loads_the_folder(tiny, export, tmp_path, architecture, model, capsys):
    timm = pytest.importorskip("timm")
    model = {"dropout": 0.0, "drop_path": 0.0, **model}
    run = random_weights(tiny, tmp_path / "x.safetensors", **model)
    report = export(ckpt=tmp_path / "x.safetensors", format="hub", license="mit", output=tmp_path / "hub", images=32)
    assert report["timm"] == architecture
    images = torch.randn(2, 3, 32, 32)
    own = Trained.open(tmp_path / "hub").build().eval()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), own(images), rtol=1e-5, atol=1e-5)
    card = (tmp_path / "hub" / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("moa-train init="))
    ready = [addable(text) for text in shlex.split(command)[1:] if not text.startswith(("init", "data"))]
    OverridesParser.create().parse_overrides(ready)  # Hydra's grammar has no quoted keys
    assert ("++model.args.kwargs={depth:2}" in ready) == (architecture == "test_vit")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    settings = config.get("model_args", {}) | {"num_classes": 10}
    again = timm.create_model(architecture, checkpoint_path=tmp_path / "hub" / "model.safetensors", **settings).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images), theirs(images))
    used = timm.data.resolve_data_config(model=theirs, use_test_size=True)
    assert (used["input_size"], used["crop_pct"], used["crop_mode"]) == ((3, 32, 32), 1.0, "center")
    assert not {"tag", "paper_ids", "origin_url", "url"} & set(config["pretrained_cfg"])
    assert config["label_names"] == [str(digit) for digit in range(10)]
    found = evaluation(tmp_path / "hub", tmp_path / "x.json", capsys)
    assert found["total"] == 359
    if run.model.name == "timm":  # a model for larger images and other classes starts from them
        run.model.args["pretrained"] = str(tmp_path / "hub" / "model.safetensors")
        create_model(run.model, image_size=(64, 64), num_classes=7).load_pretrained()
