import pytest
import torch
from torch import nn

from moa_train.interfaces import Classifier
from moa_train.model.registry import create_model
from moa_train.optim.groups import parameter_groups, split_matrices
from moa_train.optim.optimizers import create_optimizer
from moa_train.runtime.errors import UserError
from moa_train.schema import MoaConfig, ModelConfig, OptimConfig

SMALL = {"patch_size": 4, "embed_dim": 16, "depths": [2, 1], "heads": [2, 2], "window": 4, "drop_path": 0.0}
MODELS = {
    "moa": ModelConfig(**SMALL, moa=MoaConfig(reduction=4)),
    "moa, published": ModelConfig(**SMALL, moa=MoaConfig(reduction=4, form="published")),
    "swin": ModelConfig(**SMALL, name="swin"),
    "vit": ModelConfig(**{**SMALL, "depths": [2], "heads": [2]}, name="vit"),
    "resnet": ModelConfig(name="resnet", embed_dim=64, depths=[2, 1, 1, 1], drop_path=0.0),
}
TABLES = {"relative_position_bias_table", "pos_embedding", "class_token"}

# Layers below the head, counted by hand. The depths are [2, 1], [2] (vit) and [2, 1, 1, 1] (resnet).
LAYERS_BELOW_HEAD = {
    "moa": {
        "patch_embed.proj.weight": 6,
        "patch_embed.norm.bias": 6,
        "layers.0.blocks.0.attn.qkv.weight": 5,
        "layers.0.blocks.1.mlp.fc1.bias": 4,
        "layers.0.moa.relative_position_bias_table": 3,
        "layers.0.moa.q.weight": 3,
        "layers.0.downsample.reduction.weight": 3,
        "layers.1.blocks.0.norm1.weight": 2,
        "norm.weight": 1,
        "head.weight": 0,
        "head.bias": 0,
    },
    "moa, published": {
        "patch_embed.proj.weight": 6,
        "layers.0.blocks.0.attn.relative_position_bias_table": 5,
        "layers.0.blocks.1.attn.proj.weight": 4,
        "layers.0.glb_attn.q.weight": 3,
        "layers.0.norm1.weight": 3,
        "layers.0.downsample.norm.weight": 3,
        "layers.1.blocks.0.mlp.fc2.weight": 2,
        "norm.bias": 1,
        "head.weight": 0,
    },
    "swin": {
        "features.0.0.weight": 6,
        "features.1.0.attn.qkv.weight": 5,
        "features.1.1.mlp.0.weight": 4,
        "features.2.reduction.weight": 3,
        "features.3.0.norm2.bias": 2,
        "norm.weight": 1,
        "head.bias": 0,
    },
    "vit": {
        "class_token": 4,
        "encoder.pos_embedding": 4,
        "conv_proj.weight": 4,
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": 3,
        "encoder.layers.encoder_layer_1.mlp.3.bias": 2,
        "encoder.ln.weight": 1,
        "heads.head.weight": 0,
    },
    "resnet": {
        "conv1.weight": 6,
        "bn1.weight": 6,
        "layer1.0.conv1.weight": 5,
        "layer1.1.bn3.bias": 4,
        "layer2.0.downsample.0.weight": 3,
        "layer3.0.conv2.weight": 2,
        "layer4.0.conv2.weight": 1,
        "fc.weight": 0,
    },
}


def build(name: str) -> nn.Module:
    return create_model(MODELS[name], image_size=(32, 32), num_classes=3)


def names_by_decay(model: nn.Module) -> tuple[set[str], set[str]]:
    groups = {group["name"]: group for group in parameter_groups(model, OptimConfig(weight_decay=0.05))}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"decay": 0.05, "no_decay": 0.0}
    return tuple({name for name, _ in groups[kind]["params"]} for kind in ("decay", "no_decay"))  # type: ignore[return-value]


@pytest.mark.parametrize("name", MODELS)
def test_kernels_of_products_and_convolutions_decay_and_nothing_else(name):
    model = build(name)
    decay, rest = names_by_decay(model)
    assert decay | rest == {name for name, _ in model.named_parameters()}
    assert not decay & rest
    kernels = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    kernels |= {name for name, _ in model.named_parameters() if name.endswith("in_proj_weight")}
    assert decay == kernels


class Plain(Classifier):
    """A model with the defaults of `Classifier`."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


def test_defaults_of_a_model():
    model = Plain()
    decay, rest = names_by_decay(model)
    assert decay == {"body.weight", "head.weight"}
    assert rest == {"words.weight", "body.bias", "head.bias"}
    matrices, _ = split_matrices(model, parameter_groups(model, OptimConfig()))
    assert [name for group in matrices for name, _ in group["params"]] == ["body.weight"]
    with pytest.raises(UserError, match="needs a model that declares its layers, and Plain"):
        parameter_groups(model, OptimConfig(layer_decay=0.5))


def test_frozen_and_shared_parameters():
    model = Plain()
    model.last = nn.Linear(4, 4)
    model.last.weight = model.body.weight
    model.head.requires_grad_(False)
    decay, rest = names_by_decay(model)
    assert (decay, rest) == ({"body.weight"}, {"words.weight", "body.bias", "last.bias"})


@pytest.mark.parametrize("name", ["moa", "swin", "vit"])
def test_muon_gets_the_matrices_of_the_body(name):
    model = build(name)
    groups = parameter_groups(model, OptimConfig())
    matrices, rest = split_matrices(model, groups)
    names = {name for group in matrices for name, _ in group["params"]}
    body = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not name.startswith("head") and name.split(".")[-1] not in TABLES
    }
    assert names == body
    count = sum(len(group["params"]) for group in groups)
    assert sum(len(group["params"]) for group in [*matrices, *rest]) == count


@pytest.mark.parametrize("name", LAYERS_BELOW_HEAD)
def test_layer_decay_follows_the_table(name):
    model, table = build(name), LAYERS_BELOW_HEAD[name]
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1, layer_decay=0.75))
    scales = {name: group["lr_scale"] for group in groups for name, _ in group["params"]}
    assert {name: scales[name] for name in table} == {name: 0.75**layers for name, layers in table.items()}
    assert set(scales.values()) == {0.75**layers for layers in table.values()}  # no layer is missing, none is empty
    decay, rest = names_by_decay(model)
    assert {name for group in groups if group["weight_decay"] == 0.1 for name, _ in group["params"]} == decay
    assert {name for group in groups if group["weight_decay"] == 0.0 for name, _ in group["params"]} == rest


@pytest.mark.parametrize("name", MODELS)
def test_without_layer_decay_there_is_one_group_of_each_kind_in_the_order_of_the_model(name):
    model = build(name)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.05, layer_decay=1.0))
    assert [(group["name"], group["weight_decay"], group["lr_scale"]) for group in groups] == [
        ("decay", 0.05, 1.0),
        ("no_decay", 0.0, 1.0),
    ]
    order = [name for name, _ in model.named_parameters()]
    for group in groups:
        names = [name for name, _ in group["params"]]
        assert names == sorted(names, key=order.index)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_scales_the_learning_rate_of_every_layer(optimizer):
    model = build("moa")
    config = OptimConfig(name=optimizer, layer_decay=0.5)
    optimizers = create_optimizer(config, model, 1e-3)
    optimizers.set_lr(1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group["lr"] for group in optimizers.param_groups for parameter in group["params"]}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    table = LAYERS_BELOW_HEAD["moa"]
    assert {name: found[name] for name in table} == {name: 0.5**layers for name, layers in table.items()}


def test_a_lower_layer_moves_less():
    model = build("moa")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = create_optimizer(OptimConfig(layer_decay=0.5, weight_decay=0.0), model, 1e-3)
    optimizers.set_lr(1e-3)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizers.step()
    # The first step of AdamW is the learning rate in every entry whose gradient is far above eps.
    moved = {name: (parameter.detach() - before[name]).abs().max() for name, parameter in model.named_parameters()}
    for name, layers in (("head.weight", 0), ("layers.1.blocks.0.mlp.fc2.weight", 2), ("patch_embed.proj.weight", 6)):
        assert moved[name].item() == pytest.approx(1e-3 * 0.5**layers, rel=0.05)
