from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from moa_train.model.attention import relative_position_index
from moa_train.model.load import load_weights, offsets, resize_kernel, resize_offsets
from moa_train.model.registry import create_model
from moa_train.runtime.errors import UserError
from moa_train.schema import MoaConfig, ModelConfig


def test_same_geometry_changes_nothing(small, variant):
    model, other = small(variant).eval(), small(variant).eval()
    loaded = load_weights(other, model.state_dict())
    assert (loaded.resized, loaded.new) == ([], [])
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    images = torch.randn(2, 3, *(18, 21) if variant == "paper, padded" else (16, 16))
    assert torch.equal(model(images), other(images))


def test_another_resolution_resizes_the_table_of_the_grid_alone(small):
    weights = small().state_dict()
    larger = small(image_size=(32, 24))  # 4 x 3 windows instead of 2 x 2
    loaded = load_weights(larger, weights)
    assert loaded.resized == ["layers.0.moa.relative_position_bias_table: (3, 3, 2) -> (7, 5, 2)"]
    assert str(loaded) == "resized layers.0.moa.relative_position_bias_table: (3, 3, 2) -> (7, 5, 2)"
    back = load_weights(small(), larger.state_dict())  # a 3-D table gives the sides of any grid
    assert back.resized == ["layers.0.moa.relative_position_bias_table: (7, 5, 2) -> (3, 3, 2)"]


def test_another_window_resizes_tables_and_the_kernels_of_moa(small):
    weights = small().state_dict()
    names = {line.split(":")[0] for line in load_weights(small(window=8), weights).resized}
    assert names == {
        "layers.0.blocks.0.attn.relative_position_bias_table",
        "layers.0.moa.relative_position_bias_table",
        "layers.0.moa.q.weight",
        "layers.0.moa.kv.weight",
    }


def test_published_tables_are_resized_by_their_index(small):
    model = small("published")
    assert offsets(torch.empty(3 * 5, 2), relative_position_index(2, 3)) == (3, 5)
    assert offsets(torch.empty(5 * 3, 2), relative_position_index(3, 2)) == (5, 3)
    loaded = load_weights(small("published", image_size=(32, 32)), model.state_dict())
    assert "layers.0.glb_attn.relative_position_bias_table: (9, 2) -> (49, 2)" in loaded.resized
    wide = small("published", image_size=(16, 32))
    with pytest.raises(UserError, match="order"):  # 2 x 4 and 4 x 2 windows have tables of one shape
        load_weights(small("published", image_size=(32, 16)), wide.state_dict())


def test_a_table_is_interpolated_around_its_center():
    offset = torch.arange(-3.0, 4.0)
    table = (offset[:, None] * 2 + offset[None, :])[..., None]  # linear in both offsets
    finer = resize_offsets(table, (7, 7), torch.Size([13, 7, 1]), (13, 7))
    expected = (torch.linspace(-3, 3, 13)[:, None] * 2 + offset[None, :])[..., None]
    torch.testing.assert_close(finer[4:-4, 2:-2], expected[4:-4, 2:-2], atol=0.05, rtol=0)
    assert finer[6, 3, 0] == 0
    assert finer[0, 0, 0] == table[0, 0, 0]
    assert torch.equal(resize_offsets(table, (7, 7), table.shape, (7, 7)), table)
    assert torch.equal(resize_offsets(table, (7, 7), torch.Size([1, 7, 1]), (1, 7)), table[3:4])
    assert torch.equal(resize_offsets(table, (7, 7), torch.Size([1, 1]), (1, 1)), table[3, 3:4])


def test_a_resized_kernel_sees_the_same_constant():
    kernel = torch.rand(4, 2, 4, 4) + 0.5
    for size in (2, 6, 8):
        torch.testing.assert_close(resize_kernel(kernel, size).sum((2, 3)), kernel.sum((2, 3)), rtol=0.05, atol=0)


def test_vit_positions_are_resized_after_the_class_token(small):
    loaded = load_weights(small("vit", image_size=(32, 32)), small("vit").state_dict())
    assert loaded.resized == ["encoder.pos_embedding: (1, 17, 16) -> (1, 65, 16)"]


def test_another_classifier_needs_head_new(small, variant):
    weights = small(variant).state_dict()
    other = small(variant, num_classes=7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError, match="init_head=new reinitializes it"):
        load_weights(other, weights)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())  # untouched
    loaded = load_weights(other, weights, head="new")
    assert loaded.new == sorted(name for name in before if name.startswith(other.head_name))
    assert str(loaded).startswith("new classifier (")
    assert str(load_weights(small(variant), weights)) == "all tensors as they are"
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name] if name in loaded.new else weights[name])


def test_entries_that_do_not_match_are_listed(small):
    weights = small().state_dict()
    weights["layers.0.blocks.9.norm1.weight"] = weights.pop("layers.0.blocks.0.norm1.weight")
    weights["norm.weight"] = torch.ones(3)
    with pytest.raises(UserError) as caught:
        load_weights(small(), weights)
    text = str(caught.value)
    assert "do not match the model in 3 entries" in text
    assert "unexpected: layers.0.blocks.9.norm1.weight (16)" in text
    assert "missing: layers.0.blocks.0.norm1.weight (16)" in text
    assert "different: norm.weight (3), the model has (32)" in text
    with pytest.raises(UserError, match=r"\.\.\. and \d+ more"):
        load_weights(small(), small("swin").state_dict())


def test_weights_that_count_positions_in_another_order_are_refused(small):
    weights = small("published").state_dict()
    name = "layers.0.blocks.0.attn.relative_position_index"
    weights[name] = weights[name].t()
    with pytest.raises(UserError, match="numbers the positions in another order"):
        load_weights(small("published"), weights)


@pytest.fixture(scope="module")
def digits():
    """A small model trained on digits of 16 x 16 pixels, with held-out images and labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    images = F.interpolate(images, size=(16, 16), mode="bilinear")
    images, labels = (images - images.mean()) / images.std(), torch.tensor(data.target)
    torch.manual_seed(0)
    model = create_model(CONFIG, image_size=(16, 16), num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
    train, held_out = torch.randperm(len(images)).split([1400, 397])
    for _ in range(200):
        rows = train[torch.randint(1400, (64,))]
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), images[held_out], labels[held_out]


CONFIG = ModelConfig(
    patch_size=2,
    embed_dim=32,
    depths=[1, 1],
    heads=[2, 4],
    window=4,
    mlp_ratio=2,
    drop_path=0.0,
    moa=MoaConfig(reduction=8),
)


@pytest.mark.parametrize(("size", "window"), [(16, 4), (20, 5), (24, 6)])
def test_a_trained_model_degrades_gracefully_at_another_resolution_and_window(digits, size, window):
    model, images, labels = digits
    other = create_model(replace(CONFIG, window=window), image_size=(size, size), num_classes=10).eval()
    load_weights(other, model.state_dict())
    with torch.no_grad():
        expected = (model(images).argmax(1) == labels).float().mean().item()
        logits = other(F.interpolate(images, size=(size, size), mode="bilinear"))
    found = (logits.argmax(1) == labels).float().mean().item()
    assert expected > 0.8
    assert found == expected if size == 16 else found > expected - 0.15, f"{expected:.3f} -> {found:.3f}"


def test_vit_positions_keep_their_place_if_the_grid_turns(small):
    """Tables of equal size can belong to different grids."""
    model = small("vit", image_size=(16, 64))
    rows, columns = model.grid
    assert rows != columns
    weights = model.state_dict()
    table = torch.zeros(1, rows * columns + 1, 16)
    table[0, 1:, 0] = torch.arange(rows).repeat_interleave(columns)  # the row of each position
    weights["encoder.pos_embedding"] = table
    load_weights(model, weights, grid=(rows, columns))
    assert torch.equal(model.encoder.pos_embedding, table)
    turned = small("vit", image_size=(64, 16))
    load_weights(turned, weights, grid=(rows, columns))
    found = turned.encoder.pos_embedding[0, 1:, 0].unflatten(0, turned.grid)
    assert (found.diff(dim=0) >= 0).all()
    torch.testing.assert_close(found, found[:, :1].expand_as(found))
