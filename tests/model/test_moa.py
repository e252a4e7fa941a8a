"""Properties of the paper's MOA block; its numbers are checked against plain loops in test_brute_force.py."""

import pytest
import torch
from torch import Tensor, nn

from moa_train.model.moa import MOABlock, add_to_windows


def stage_output(model: nn.Module, images: Tensor) -> Tensor:
    """Return the first stage's map (B, H, W, C)."""
    return model.forward_features(images)[0].permute(0, 2, 3, 1)


def watch_attention(block: MOABlock) -> list[tuple[Tensor, ...]]:
    """Return a list that collects the queries, keys and values (B, h, w, C) of every forward pass."""
    seen, attention = [], block.attention
    block.attention = lambda *tokens: seen.append(tokens) or attention(*tokens)
    return seen


def windows(x_HW: Tensor, side: int) -> Tensor:
    """Return whether anything is true within each window."""
    return x_HW.unflatten(1, (-1, side)).unflatten(0, (-1, side)).any(1).any(-1)


@pytest.mark.parametrize("moved", [(0, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("image_size", [(24, 24), (22, 23)])
def test_a_change_in_one_window_reaches_all_others_through_moa_and_none_without(small, moved, image_size):
    top, left = (8 * corner for corner in moved)
    for enabled in (True, False):
        model = small(image_size=image_size, moa_enabled=enabled).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # far from the initial values, where tables are 0
                parameter.add_(torch.randn_like(parameter) * 0.1)
        images = torch.randn(1, 3, *image_size, dtype=torch.float64)
        before = stage_output(model, images)
        images[:, :, top : top + 8, left : left + 8] = images[:, :, top : top + 8, left : left + 8].flip(-1)
        difference_HW = (stage_output(model, images) - before).abs().sum(-1)[0] > 0
        padded_HW = torch.zeros(12, 12, dtype=torch.bool)
        padded_HW[: difference_HW.shape[0], : difference_HW.shape[1]] = difference_HW
        changed = windows(padded_HW, 4)
        if enabled:
            assert changed.all()
        else:
            assert changed.nonzero().tolist() == [list(moved)]


def test_a_query_is_made_of_its_own_window_and_lands_there(small):
    model = small().double().eval()
    block = model.layers[0].moa
    seen, tokens = watch_attention(block), torch.zeros(1, 2, 2, 16, dtype=torch.float64)
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    stage_output(model, images)
    images[:, :, :8, 8:] += 1.0  # the window at the top right
    stage_output(model, images)
    assert ((seen[0][0] - seen[1][0]).abs().sum(-1)[0] > 0).tolist() == [[False, True], [False, False]]

    outputs = []
    block.expand.register_forward_hook(lambda *_: tokens)
    for value in (0.0, 1.0):
        tokens[0, 0, 1] = value
        outputs.append(stage_output(model, images))
    expected_HWC = torch.zeros(8, 8, 16, dtype=torch.float64)
    expected_HWC[:4, 4:] = 1.0
    torch.testing.assert_close((outputs[1] - outputs[0])[0], expected_HWC)


def test_keys_reach_into_the_neighboring_windows_by_the_overlap(small):
    for overlap in (0, 1, 3):
        block = small(image_size=(24, 24), moa_overlap=overlap).double().layers[0].moa
        x_BHWC = torch.randn(1, 12, 12, 16, dtype=torch.float64, requires_grad=True)
        seen = watch_attention(block)
        block(x_BHWC)
        (gradient,) = torch.autograd.grad(seen[0][1][0, 1, 1].sum(), x_BHWC)  # of the window in the middle
        reached = (gradient.abs().sum(-1)[0] > 0).nonzero()
        assert reached.min(0).values.tolist() == [4 - overlap] * 2
        assert reached.max(0).values.tolist() == [7 + overlap] * 2


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_tokens_are_added_to_all_positions_of_their_window(size):
    height, width = size
    x_BHWC, tokens = torch.zeros(1, height, width, 1), torch.arange(6.0).view(1, 2, 3, 1)
    out = add_to_windows(x_BHWC, tokens[:, :, : -(-width // 4)], 4)[0, :, :, 0]
    for y in range(height):
        for x in range(width):
            assert out[y, x] == tokens[0, y // 4, x // 4, 0]


@pytest.mark.parametrize(
    ("image_size", "moa"),
    [((16, 16), [True, True, True, False]), ((16, 8), [True, True, False]), ((16, 3), [False, False])],
)
def test_a_moa_block_ends_every_stage_but_the_last_if_the_map_holds_a_window(small, image_size, moa):
    ones = [1] * len(moa)
    model = small(image_size=image_size, patch_size=1, embed_dim=32, depths=ones, heads=ones)
    assert [hasattr(layer, "moa") for layer in model.layers] == moa


def test_stochastic_depth_grows_linearly_over_local_and_over_moa_blocks(small):
    model = small(image_size=(64, 64), depths=(2, 2, 1), heads=(1, 1, 1), drop_path=0.4, moa_drop_path=0.2)
    local = [block.drop_path.rate for layer in model.layers for block in layer.blocks]
    moa = [layer.moa.drop_path.rate for layer in model.layers if hasattr(layer, "moa")]
    assert local == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert moa == pytest.approx([0.0, 0.2])
    assert small(moa_drop_path=0.2).layers[0].moa.drop_path.rate == 0.0  # a single block gets the ramp's first rate


def test_initial_values(small):
    model = small(embed_dim=64, heads=(2, 2))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        if isinstance(module, MOABlock):
            assert not module.relative_position_bias_table.any()
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.3)
