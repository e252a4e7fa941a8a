"""Models of timm: settings, descriptions, pretrained weights, and real runs."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from moa_train.model.load import load_weights
from moa_train.model.registry import check_model, create_model
from moa_train.model.summary import summarize, training_cost
from moa_train.optim.groups import parameter_groups, split_matrices
from moa_train.runtime.errors import UserError
from moa_train.schema import OptimConfig

timm = pytest.importorskip("timm")
param_groups_layer_decay = pytest.importorskip("timm.optim").param_groups_layer_decay

FAMILIES = [
    *("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet", "swin_tiny_patch4_window7_224"),
    *(
        "deit_tiny_distilled_patch16_224",
        "pit_ti_224",
        "poolformer_s12",
        "densenet121",
        "vgg11",
        "beit_base_patch16_224",
    ),
]
SIZE = {"image_size": (32, 32), "num_classes": 7}


@pytest.fixture
def build(model_config):
    """A function that builds a model of timm: ``build("test_vit", kwargs={"depth": 2})``."""

    def create(variant: str, *, image_size=(32, 32), num_classes=7, pretrained=None, kwargs=None, **fields):
        args = {"pretrained": pretrained and str(pretrained), "kwargs": kwargs or {}}
        config = model_config(name="timm", variant=variant, args=args, **fields)
        return create_model(config, image_size=image_size, num_classes=num_classes)

    return create


@pytest.mark.parametrize("variant", FAMILIES)
def test_families_are_summarized_and_described(model_config, variant):
    config = model_config(name="timm", variant=variant)
    summary = summarize(config, **SIZE)
    with torch.device("meta"):
        model, images = create_model(config, **SIZE).eval().requires_grad_(False), torch.empty(1, 3, 32, 32)
    assert summary.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert model(images).shape == (1, 7)
    assert summary.total_macs == counter.get_total_flops() // 2 > 0
    assert summary.table()
    assert isinstance(model.get_submodule(model.head_name), torch.nn.Linear)

    names = {name for name, _ in model.named_parameters()}
    heads = {name for name in names if name.startswith(tuple(f"{head}." for head in model.heads))}
    layers = model.layer_ids()
    if variant not in ("poolformer_s12", "pit_ti_224"):  # timm doesn't declare their layers
        assert layers.keys() == names
        assert {layers[name] for name in heads} == {max(layers.values())}
    assert not heads & model.hidden_matrices()
    assert model.no_weight_decay() <= names


def test_stages_have_the_maps_of_timm(build):
    model, images = build("test_resnet").eval(), torch.randn(2, 3, 32, 32)
    maps = model.forward_features(images)
    assert torch.equal(maps[-1], model.net.forward_features(images))
    assert [map_BCHW.shape[2] for map_BCHW in maps] == [16, 8, 4, 2, 1]


def test_settings_reach_timm(build):
    model = build("test_vit", image_size=(32, 48), drop_path=0.3, dropout=0.2, checkpointing=True, kwargs={"depth": 2})
    assert model.net.patch_embed.grid_size == (2, 3)
    assert [type(block.drop_path1).__name__ for block in model.net.blocks] == ["Identity", "DropPath"]
    assert model.net.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.net.head_drop.p == 0.2
    assert model.net.grad_checkpointing


def test_weights_are_those_of_timm(build):
    torch.manual_seed(3)
    ours = build("test_vit").net.state_dict()
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=7, img_size=32, drop_path_rate=0.0).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_checkpointing_changes_no_gradient_and_saves_memory(build, model_config):
    images, gradients = torch.randn(3, 3, 32, 32), []
    weights = build("test_vit").state_dict()
    for checkpointing in (False, True):
        model = build("test_vit", checkpointing=checkpointing).train()
        model.load_state_dict(weights)
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    plain, recomputed = (
        training_cost(
            model_config(name="timm", variant="vit_tiny_patch16_224", checkpointing=checkpointing),
            image_size=(128, 128),
            num_classes=7,
            batch_size=32,
        ).memory
        for checkpointing in (False, True)
    )
    assert recomputed < 0.6 * plain


def test_muon_gets_the_matrices_of_the_blocks(build):
    model = build("test_vit")
    matrices, rest = split_matrices(model, parameter_groups(model, OptimConfig()))
    hidden = {name for group in matrices for name, _ in group["params"]}
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert hidden == {f"net.blocks.{block}.{kind}.weight" for block in range(6) for kind in kinds}
    assert "net.head.weight" in {name for group in rest for name, _ in group["params"]}


@pytest.mark.parametrize("variant", ["test_resnet", "test_vit", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_layers_and_decay_are_those_of_timm(build, variant):
    model = build(variant)
    names = {parameter: name for name, parameter in model.named_parameters()}
    exempt = model.net.no_weight_decay() if hasattr(model.net, "no_weight_decay") else ()
    expected = param_groups_layer_decay(model.net, 0.1, exempt, layer_decay=0.5)
    theirs = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in expected
        for parameter in group["params"]
    }
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1, layer_decay=0.5))
    ours = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name, _ in group["params"]}
    assert ours == theirs
    assert len({scale for scale, _ in ours.values()}) > 4


def test_layer_decay_needs_layers(build):
    with pytest.raises(UserError, match=r"optim.layer_decay=0.5 needs a model that declares its layers"):
        parameter_groups(build("poolformer_s12"), OptimConfig(layer_decay=0.5))


@pytest.mark.parametrize(
    ("variant", "fields", "parts"),
    [
        ("resnet19", {}, ["model.variant=resnet19", "Did you mean 'resnet18'?"]),
        ("hf-hub:timm/resnet18.a1_in1k", {}, ["timm has no such model"]),
        ("crossvit_tiny_240", {}, ["crossvit_tiny_240", "32 x 32", "data.image_size"]),
        ("test_vit", {"args": {"kwargs": {"depht": 2}}}, ["depht", "test_vit"]),
        ("vgg11", {"drop_path": 0.1}, ["model.drop_path=0.1", "set it to 0"]),
        ("test_vit", {"args": {"kwargs": {"pretrained": True}}}, ["kwargs.pretrained", "model.args.pretrained"]),
        ("test_vit", {"args": {"kwargs": {"checkpoint_path": "x"}}}, ["kwargs.checkpoint_path"]),
        ("test_vit", {"args": {"pretrain": "x"}}, ["model.args.pretrain", "Did you mean 'pretrained'?"]),
    ],
)
def test_settings_that_do_not_work_are_errors(model_config, variant, fields, parts):
    with pytest.raises(UserError) as caught:
        check_model(model_config(name="timm", variant=variant, **fields), (32, 32))
    for part in parts:
        assert part in str(caught.value)


def test_without_timm_the_error_says_how_to_install_it(model_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # Python treats it as not installed
    with pytest.raises(UserError, match=r"pip install 'moa-train\[timm\]'"):
        check_model(model_config(name="timm", variant="resnet18"), (32, 32))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_pretrained_weights_from_a_file(build, tmp_path, suffix, monkeypatch):
    source = build("test_vit", image_size=(64, 64), num_classes=5)
    weights = source.net.state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights}, path)

    monkeypatch.setenv("HOME", str(tmp_path))
    same = build("test_vit", image_size=(64, 64), num_classes=5, pretrained=f"~/{path.name}")
    same.load_pretrained()
    assert all(torch.equal(value, weights[name]) for name, value in same.net.state_dict().items())

    tuned = build("test_vit", num_classes=7, pretrained=path)  # other classes, and positions at another image size
    before = {name: value.clone() for name, value in tuned.net.state_dict().items()}
    tuned.load_pretrained()
    after = tuned.net.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ("head.weight", "head.bias"))
    assert all(
        torch.equal(after[name], weights[name]) for name in after if name.split(".")[0] not in ("head", "pos_embed")
    )
    assert not torch.equal(after["pos_embed"], before["pos_embed"])

    other = build("test_vit", kwargs={"depth": 5}, pretrained=path)
    with pytest.raises(UserError, match=r"(?s)does not match model.variant=test_vit.*blocks\.5"):
        other.load_pretrained()
    with pytest.raises(UserError, match="nowhere"):
        build("test_vit", pretrained=tmp_path / f"nowhere{suffix}").load_pretrained()


@pytest.mark.parametrize("variant", ["test_vit", "beit_base_patch16_224"])
@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed", "weight"])
def test_weights_that_timm_cannot_convert_are_errors(build, tmp_path, variant, name):
    """Its conversions raise RuntimeError, IndexError, AttributeError and AssertionError for these."""
    save_file({name: torch.zeros(3)}, tmp_path / "foreign.safetensors")
    model = build(variant, kwargs={"depth": 1}, pretrained=tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match=f"does not match model.variant={variant}"):
        model.load_pretrained()


@pytest.mark.parametrize(
    ("variant", "optimizer", "layer_decay"), [("test_vit", "muon", 0.7), ("test_convnext", "adamw", 0.8)]
)
def test_a_run_resumes_exactly_and_evaluates_after_its_pretrained_file_is_gone(
    train, outcome, build, tmp_path, variant, optimizer, layer_decay
):
    path = tmp_path / "pretrained.safetensors"
    save_file(build(variant, num_classes=3).net.state_dict(), path)
    changes = {
        "model.name": "timm",
        "model.variant": variant,
        "model.args.pretrained": str(path),
        "optim.name": optimizer,
        "optim.layer_decay": layer_decay,
    }
    assert train(tmp_path / "straight", **changes) == 0
    assert train(tmp_path / "stopped", **changes, **{"engine.stop_after": "5 steps"}) == 0
    first = load_file(tmp_path / "stopped" / "checkpoints" / "last" / "model.safetensors")
    assert any(name.startswith("net.") for name in first)
    path.unlink()
    assert train(tmp_path / "stopped", resume=True, **{"engine.stop_after": "null"}) == 0
    resumed, straight = outcome(tmp_path / "stopped"), outcome(tmp_path / "straight")
    assert (resumed["tensors"], resumed["state"]) == (straight["tensors"], straight["state"])
    assert train(tmp_path / "stopped", resume=True, replay=6) == 0

    command = [sys.executable, "-m", "moa_train.cli.evaluate", f"ckpt={tmp_path / 'stopped'}", "device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"] == 359


def test_weights_of_another_image_size_need_the_conversion_of_timm(build):
    weights = build("test_vit", image_size=(64, 64)).state_dict()
    with pytest.raises(UserError, match=r"net\.pos_embed(?s:.*)format=hub .* give model\.args\.pretrained=FOLDER"):
        load_weights(build("test_vit"), weights)


def test_both_classifiers_of_a_distilled_model_are_renewed(build):
    weights = build("deit_tiny_distilled_patch16_224").state_dict()
    loaded = load_weights(build("deit_tiny_distilled_patch16_224", num_classes=3), weights, head="new")
    assert loaded.new == [f"net.{head}.{name}" for head in ("head", "head_dist") for name in ("bias", "weight")]


def test_the_original_file_of_a_swin_is_converted(build, tmp_path):
    """Its classifier has another name than timm's, and a stage ends with the merging that begins one in timm."""
    weights = build("swin_tiny_patch4_window7_224", num_classes=5).net.state_dict()
    old = {
        re.sub(
            r"(\d)\.downsample", lambda found: f"{int(found[1]) - 1}.downsample", name.replace("head.fc.", "head.")
        ): value
        for name, value in weights.items()
    }
    save_file(old, tmp_path / "swin.safetensors")
    for classes in (5, 7):
        model = build("swin_tiny_patch4_window7_224", num_classes=classes, pretrained=tmp_path / "swin.safetensors")
        head = model.net.state_dict()["head.fc.weight"].clone()
        model.load_pretrained()
        found = model.net.state_dict()
        assert torch.equal(found["head.fc.weight"], weights["head.fc.weight"] if classes == 5 else head)
        assert torch.equal(found["layers.0.blocks.0.attn.qkv.weight"], weights["layers.0.blocks.0.attn.qkv.weight"])


def test_models_that_compute_on_the_host_while_they_are_built_are_summarized(model_config):
    config = model_config(name="timm", variant="regnety_002")
    assert summarize(config, image_size=(32, 32), num_classes=10).total_macs > 0
