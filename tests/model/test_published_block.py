"""The published form reproduces the numbers of the published implementation (golden/, computed in float64)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_train.model.registry import create_model
from moa_train.schema import MoaConfig, ModelConfig

GOLDEN = Path(__file__).parent / "golden"


def random_numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape))


def build(config: dict) -> nn.Module:
    return create_model(
        ModelConfig(
            patch_size=config["patch_size"],
            embed_dim=config["embed_dim"],
            depths=config["depths"],
            heads=config["num_heads"],
            window=config["window_size"],
            moa=MoaConfig(form="published"),
        ),
        image_size=(config["img_size"], config["img_size"]),
        num_classes=config["num_classes"],
    ).double()


@pytest.mark.parametrize("name", ["mini_112", "moa_tiny_224", "moa_small_224", "moa_base_224"])
def test_golden_numbers(name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    config = golden["config"]
    model = build(config).eval()
    state = model.state_dict()
    assert [[key, list(value.shape), f"{value.dtype}"[6:]] for key, value in state.items()] == golden["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == golden["params"]

    for key, parameter in model.named_parameters():
        values = random_numbers(zlib.crc32(key.encode()), tuple(parameter.shape)) * 0.05
        parameter.data = values + 1.0 if key.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else values
    images = random_numbers(golden["image_seed"], (golden["batch"], 3, config["img_size"], config["img_size"]))
    logits = model(images)
    loss = F.cross_entropy(logits, torch.tensor(golden["target"]))
    loss.backward()

    torch.testing.assert_close(logits, torch.tensor(golden["logits"], dtype=torch.float64), rtol=1e-9, atol=0)
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-9)
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    # Where a grid has one window only, its position table has no gradient: 0 must be 0.
    assert norms == pytest.approx(golden["grad_norms"], rel=1e-7, abs=0)


def test_a_token_lands_on_a_strip_of_the_image_and_not_on_its_window(small):
    """Unlike the paper form (test_moa.py), the published form mixes positions: see docs/MODEL.md."""
    model = small("published").double().eval()
    stage, P, (h, w) = model.layers[0], 4, (2, 2)
    token = torch.zeros(1, h * w, 16, dtype=torch.float64)
    token[0, 1] = 1.0  # the window at the top right
    changed = {}
    stage.norm2.register_forward_pre_hook(lambda _module, inputs: changed.update(sum=inputs[0].clone()))
    for tokens in (torch.zeros_like(token), token):
        hook = stage.glb_attn.register_forward_hook(lambda _module, _inputs, _output, tokens=tokens: tokens)
        before = changed.get("sum")
        model(random_numbers(1, (1, 3, 16, 16)))
        hook.remove()
    where_HW = (changed["sum"] - before).abs().sum(-1)[0] > 0

    strip_HW = torch.zeros(8, 8, dtype=torch.bool)
    strip_HW.view(-1)[1 * P * P : 2 * P * P] = True  # rows 2 and 3 over the whole width
    assert torch.equal(where_HW, strip_HW)
    window_HW = torch.zeros(8, 8, dtype=torch.bool)
    window_HW[:P, P:] = True
    assert not torch.equal(where_HW, window_HW)


def test_the_pixels_of_a_window_feed_every_query(small):
    model = small("published").double().eval()
    queries = []
    model.layers[0].glb_attn.q.register_forward_hook(lambda _module, _inputs, output: queries.append(output))
    images = random_numbers(1, (1, 3, 16, 16))
    model(images)
    images[:, :, :8, 8:] += 1.0  # pixels of the window at the top right
    model(images)
    assert ((queries[0] - queries[1]).abs().sum(-1) > 0).all()
