"""Pictures of explanations, for each kind of model."""

import pytest
import torch
from PIL import Image

from moa_train.model.registry import create_model
from moa_train.report.attention import attention_maps
from moa_train.report.class_map import class_map
from moa_train.report.explain import draw_explanation
from moa_train.schema import MoaConfig, ModelConfig


@pytest.mark.parametrize(
    ("name", "form", "size", "panels"),
    [
        pytest.param("moa", "conv", (32, 32), (3, 2), id="MOA with convolutions"),
        pytest.param("moa", "paper", (32, 48), (3, 2), id="MOA, rectangle"),
        pytest.param("moa", "paper", (30, 50), (3, 2), id="MOA, padded"),
        pytest.param("moa", "published", (32, 32), (3, 2), id="published form"),
        pytest.param("swin", "paper", (32, 32), (2, 1), id="no attention maps"),
    ],
)
def test_every_part_is_drawn(tmp_path, name, form, size, panels):
    torch.manual_seed(0)
    conv = ["stem", "block"] if form == "conv" else []
    moa = MoaConfig(form="published" if form == "published" else "paper", reduction=4)
    config = ModelConfig(
        name=name, embed_dim=16, depths=[1, 1], heads=[1, 2], window=4, drop_path=0.0, moa=moa, conv=conv
    )
    model = create_model(config, image_size=size, num_classes=3).eval()
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    images = pixels[None] / 127.5 - 1
    maps = class_map(model, images, torch.tensor([1]))
    names = ["$x_1^", "a\x1b[31m\nred <b>", "\U0001f600 \u4e2d \ud800"]
    draw_explanation(
        tmp_path / "x.png",
        pixels,
        maps[0],
        *attention_maps(model, images),
        title="\x00$" + "long " * 40,
        explained=names[0],
        predictions=(names, [0.5, 0.3, 0.2]),
    )
    with Image.open(tmp_path / "x.png") as picture:
        columns, rows = panels
        assert picture.size == (360 * columns, 370 * rows + 30)
        colors = {color for _, color in picture.convert("RGB").getcolors(picture.width * picture.height)}
    assert ((213, 94, 0) in colors) == (name == "moa")  # the frame of the chosen window
