"""Each field of the paper's ablations (tables 4 to 7) changes what it should, and nothing else."""

import pytest
import torch

MOA = "layers.0.moa."
TABLE = "relative_position_bias_table"


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def changed(model, other) -> set[str]:
    """Entries that only one of the models has, or that differ in shape."""
    own, theirs = shapes(model), shapes(other)
    return {name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)}


def share(model, other) -> None:
    """Copy to ``other`` all weights of ``model`` that fit there."""
    fitting = {
        name: value for name, value in model.state_dict().items() if shapes(other).get(name) == tuple(value.shape)
    }
    other.load_state_dict(fitting, strict=False)


def test_window(small):
    model = small(window=4)
    names = {
        "layers.0.blocks.0.attn." + TABLE,
        MOA + TABLE,  # the number of windows differs
        MOA + "q.weight",
        MOA + "kv.weight",
    }
    assert changed(model, small(window=2)) == names | {"layers.1.blocks.0.attn." + TABLE}
    assert changed(model, small(window=8)) == names  # the second map, of 4 x 4, holds no larger window
    for window, P in ((2, 2), (4, 4), (8, 8)):
        other = small(window=window)
        assert shapes(other)[MOA + "q.weight"][2:] == (P, P)
        assert shapes(other)[MOA + "kv.weight"][2:] == (P + 2, P + 2)
        assert other.layers[0].moa.grid == (8 // window, 8 // window)


@pytest.mark.parametrize("overlap", [0, 2, 3])
def test_overlap(small, overlap):
    model, other = small().eval(), small(moa_overlap=overlap).eval()
    assert changed(model, other) == {MOA + "kv.weight"}
    assert shapes(other)[MOA + "kv.weight"] == (32, 4, 4 + 2 * overlap, 4 + 2 * overlap)
    # A wider kernel that is zero beyond the narrower one is the narrower one.
    share(model, other)
    with torch.no_grad():
        difference = overlap - 1
        wide, narrow = (other, model) if difference > 0 else (model, other)
        margin = abs(difference)
        wide.layers[0].moa.kv.weight.zero_()
        wide.layers[0].moa.kv.weight[:, :, margin:-margin, margin:-margin] = narrow.layers[0].moa.kv.weight
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), other(images))


@pytest.mark.parametrize("reduction", [1, 2, 8, 16])
def test_reduction(small, reduction):
    model, other = small(), small(moa_reduction=reduction)
    assert changed(model, other) == {MOA + name for name in ("reduce.weight", "reduce.bias", "q.weight", "kv.weight")}
    assert shapes(other)[MOA + "reduce.weight"] == (16 // reduction, 16)


def test_moa_on_or_off(small):
    model, other = small().eval(), small(moa_enabled=False).eval()
    names = changed(model, other)
    assert names
    assert all(name.startswith(MOA) for name in names)
    # A block that adds nothing changes nothing.
    share(model, other)
    with torch.no_grad():
        model.layers[0].moa.expand.weight.zero_()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), other(images))


def test_dropout_rates_and_checkpointing_change_no_shape_and_nothing_in_evaluation(small):
    model = small().eval()
    other = small(drop_path=0.5, dropout=0.5, moa_drop_path=0.5, checkpointing=True).eval()
    assert changed(model, other) == set()
    share(model, other)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), other(images))


def test_form(small):
    paper, published = small(), small("published")
    for name in changed(paper, published):
        assert (
            ".moa." in name
            or "glb_attn" in name
            or "relative_position" in name
            or name.startswith(("layers.0.norm", "layers.0.post_conv"))
        )
