import pytest
import torch
import torchvision
from torch import nn

from moa_train.optim.groups import parameter_groups, split_matrices


def names_by_decay(model: nn.Module) -> tuple[set[str], set[str]]:
    groups = {group["name"]: group for group in parameter_groups(model, 0.05)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"decay": 0.05, "no_decay": 0.0}
    return tuple({name for name, _ in groups[kind]["params"]} for kind in ("decay", "no_decay"))  # type: ignore[return-value]


@pytest.mark.parametrize("architecture", ["swin_t", "swin_v2_t", "vit_b_32", "resnet18", "convnext_tiny"])
def test_torchvision_models(architecture: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, architecture)(num_classes=10)
    decay, rest = names_by_decay(model)
    assert decay | rest == {name for name, _ in model.named_parameters()}
    assert not decay & rest
    # Told apart by the kind of module, not by name: kernels of products and convolutions decay, all else does not.
    kernels = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    kernels |= {name for name, _ in model.named_parameters() if name.endswith("in_proj_weight")}
    assert decay == kernels


def test_tables_tokens_and_embeddings_do_not_decay() -> None:
    model = nn.Module()
    exempt = ["relative_position_bias_table", "pos_embedding", "pos_embed", "absolute_pos_embed", "class_token"]
    exempt += ["cls_token", "mask_token", "position_table", "positional_encoding"]
    for name in exempt:
        model.register_parameter(name, nn.Parameter(torch.zeros(1, 4, 4)))
    model.words = nn.Embedding(3, 4)
    model.position_mixer = nn.Linear(4, 4)  # only a parameter's own name counts
    decay, rest = names_by_decay(model)
    assert rest == {*exempt, "words.weight", "position_mixer.bias"}
    assert decay == {"position_mixer.weight"}


def test_frozen_and_shared_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    decay, rest = names_by_decay(model)
    assert (decay, rest) == ({"0.weight"}, {"0.bias", "1.bias"})


def test_matrices_of_the_body() -> None:
    model = torchvision.models.vit_b_32(num_classes=10)
    groups = parameter_groups(model, 0.05)
    matrices, rest = split_matrices(model, groups)
    names = {name for group in matrices for name, _ in group["params"]}
    layers = [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
    kinds = ["self_attention.in_proj_weight", "self_attention.out_proj.weight", "mlp.0.weight", "mlp.3.weight"]
    assert names == {f"{layer}.{kind}" for layer in layers for kind in kinds}
    assert {"heads.head.weight", "conv_proj.weight", "class_token", "encoder.pos_embedding"} <= {
        name for group in rest for name, _ in group["params"]
    }
    count = sum(len(group["params"]) for group in groups)
    assert sum(len(group["params"]) for group in [*matrices, *rest]) == count
