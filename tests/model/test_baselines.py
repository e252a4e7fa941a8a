"""The baselines return torchvision's numbers, accept any geometry, and share the interface of all models."""

import pytest
import torch
from torchvision.models import ResNet, SwinTransformer, VisionTransformer

from moa_train.model.registry import create_model


@pytest.mark.parametrize(
    ("variant", "original"), [("swin", SwinTransformer), ("vit", VisionTransformer), ("resnet", ResNet)]
)
def test_forward_is_that_of_torchvision(small, variant, original):
    model = small(variant).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert isinstance(model, original)
    torch.testing.assert_close(model(images), original.forward(model, images), rtol=1e-12, atol=1e-12)


def test_feature_maps_of_every_stage(small, variant):
    model = small(variant).eval()
    size = (18, 21) if variant == "paper, padded" else (16, 16)
    images = torch.randn(2, 3, *size)
    maps = model.forward_features(images)
    expected = {
        "paper, padded": [(2, 16, 9, 11), (2, 32, 5, 6)],
        "vit": [(2, 16, 4, 4)],
        "resnet": [(2, 256, 8, 8), (2, 512, 4, 4), (2, 1024, 2, 2), (2, 2048, 1, 1)],
    }.get(variant, [(2, 16, 8, 8), (2, 32, 4, 4)])
    assert [tuple(each.shape) for each in maps] == expected
    if variant != "vit":  # its head reads the class token
        logits = model.get_submodule(model.head_name)(maps[-1].mean((2, 3)))
        torch.testing.assert_close(logits, model(images))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swin", {"patch_size": 1, "embed_dim": 32, "depths": (1, 1, 1), "heads": (1, 2, 4)}),
        ("swin", {"patch_size": 2, "embed_dim": 32, "depths": (1, 1), "heads": (1, 2), "image_size": (20, 34)}),
        ("swin", {"patch_size": 4, "embed_dim": 32, "depths": (2,), "heads": (1,)}),
        ("vit", {"patch_size": 4, "embed_dim": 32, "depths": (1,), "heads": (2,), "image_size": (16, 32)}),
        ("resnet", {"patch_size": 1, "embed_dim": 64, "depths": (1, 1, 1, 1)}),
        ("resnet", {"patch_size": 2, "embed_dim": 64, "depths": (1, 1, 1, 1), "image_size": (40, 48)}),
    ],
)
def test_small_images_and_rectangles(model_config, name, changes):
    fields = {"image_size": (32, 32), "heads": (1,) * 4, "window": 4, **changes}
    size = fields.pop("image_size")
    model = create_model(model_config(name=name, **fields), image_size=size, num_classes=10)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_stem_for_small_images_keeps_their_resolution(model_config):
    for stem, side in ((1, 32), (2, 16), (4, 8)):
        config = model_config(name="resnet", patch_size=stem, embed_dim=64, depths=(1,) * 4)
        model = create_model(config, image_size=(32, 32), num_classes=2).eval()
        assert model.forward_features(torch.randn(1, 3, 32, 32))[0].shape[2:] == (side, side)


def test_checkpointing_changes_no_number(small, variant):
    size = (18, 21) if variant == "paper, padded" else (16, 16)
    rates = {} if variant in ("vit", "resnet") else {"drop_path": 0.3, "dropout": 0.1}
    images, gradients = torch.randn(3, 3, *size), []
    weights = small(variant, **rates).state_dict()
    for checkpointing in (False, True):
        model = small(variant, checkpointing=checkpointing, **rates).train()
        model.load_state_dict(weights)
        torch.manual_seed(5)  # so that the same branches are dropped
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
