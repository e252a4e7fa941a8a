from functools import reduce

import pytest
import torch
from torch import nn

from moa_train.interfaces import Classifier
from moa_train.model.attention import attend
from moa_train.model.layers import (
    Conv3x3,
    ConvBlock,
    ConvMerging,
    ConvStem,
    DepthwiseConv,
    DropPath,
    LayerNorm,
    LocalBlock,
    PatchEmbedding,
    PatchMerging,
    WindowAttention,
    padding_mask,
    project_patches,
)
from moa_train.model.network import MOATransformer
from moa_train.model.stages import StagePlan
from moa_train.schema import ModelConfig


def test_patches_are_projected_as_by_a_strided_convolution_on_the_padded_image():
    embedding = PatchEmbedding(4, 8).double()
    images = torch.randn(2, 3, 10, 15, dtype=torch.float64)
    padded = torch.zeros(2, 3, 12, 16, dtype=torch.float64)
    padded[:, :, :10, :15] = images
    patches = padded.view(2, 3, 3, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 3, 4, 48)
    expected = embedding.norm(patches @ embedding.proj.weight.flatten(1).T + embedding.proj.bias)
    torch.testing.assert_close(embedding(images), expected)
    torch.testing.assert_close(embedding(images.to(memory_format=torch.channels_last)), expected)


def test_merging_concatenates_neighbors_column_by_column():
    merging = PatchMerging(1).double()
    merging.norm, merging.reduction = nn.Identity(), nn.Identity()
    x_BHWC = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 2, 3, 1)
    assert merging(x_BHWC).tolist() == [[[[1, 4, 2, 5], [3, 6, 0, 0]]]]


@pytest.mark.parametrize(("patch", "maps"), [(2, (5, 8)), (4, (3, 4)), (8, (2, 2))])
def test_the_stem_is_a_sequence_of_strided_convolutions(patch, maps):
    stem = ConvStem(patch, 16, blocks=1).double()
    images = torch.randn(2, 3, 9, 15, dtype=torch.float64)

    def apply(layer: nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, ConvBlock):
            return x_BCHW + reduce(lambda x_BCHW, each: apply(each, x_BCHW), layer, x_BCHW)
        if not isinstance(layer, Conv3x3):
            return layer(x_BCHW.movedim(1, -1)).movedim(-1, 1)
        conv = nn.Conv2d(layer.in_features // 9, layer.out_features, 3, stride=layer.stride, padding=1).double()
        conv.load_state_dict({"weight": layer.weight.view(conv.weight.shape), "bias": layer.bias})
        return conv(x_BCHW)

    expected_BCHW = reduce(lambda x_BCHW, layer: apply(layer, x_BCHW), stem, images)
    torch.testing.assert_close(stem(images), expected_BCHW.movedim(1, -1))
    assert stem(images).shape == (2, *maps, 16)


def test_convolutional_merging_has_the_shape_of_patch_merging_and_a_matrix_for_muon():
    x_BHWC = torch.randn(2, 5, 8, 4)
    assert ConvMerging(4)(x_BHWC).shape == PatchMerging(4)(x_BHWC).shape == (2, 3, 4, 8)

    class Merging(Classifier, ConvMerging):
        pass

    assert Merging(4).hidden_matrices() == {"1.weight"}


def test_a_depthwise_convolution_sums_neighbors_of_the_same_channel():
    conv = DepthwiseConv(2).double()
    x_BHWC = torch.randn(1, 4, 5, 2, dtype=torch.float64)
    expected = x_BHWC + conv.bias
    for row in range(4):
        for column in range(5):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= row + dy < 4 and 0 <= column + dx < 5:
                        near = x_BHWC[0, row + dy, column + dx]
                        expected[0, row, column] += conv.weight[:, 0, dy + 1, dx + 1] * near
    torch.testing.assert_close(conv(x_BHWC), expected)


@pytest.mark.parametrize(("conv", "reach"), [([], 4), (["stem"], 4), (["block"], 8), (["mlp"], 5)])
def test_convolutions_cross_the_borders_of_windows(conv, reach):
    """Without MOA, information stays within a window of 4, unless convolutions pass it on."""
    config = ModelConfig(embed_dim=8, depths=[1], heads=[2], window=4, patch_size=2, conv=conv)
    config.moa.enabled = False
    stage = MOATransformer(config, image_size=(16, 16), num_classes=2).double().layers[0]
    x_BHWC = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    changed_BHWC = x_BHWC.clone()
    changed_BHWC[0, 3, 3, 0] += 1
    moved_HW = (stage(changed_BHWC) - stage(x_BHWC))[0].abs().amax(-1) > 0
    assert moved_HW.nonzero().amax(0).tolist() == [reach - 1, reach - 1]


def test_padding_mask_marks_positions_outside_of_the_map():
    assert padding_mask((8, 4), 4) is None
    mask_WL = padding_mask((3, 5), 2)
    real = (mask_WL == 0).view(2, 3, 2, 2)  # rows and columns of windows, rows and columns in a window
    assert real[0, 0].all()
    assert real[1, 0].tolist() == [[True, True], [False, False]]
    assert real[0, 2].tolist() == [[True, False], [True, False]]
    assert real[1, 2].tolist() == [[True, False], [False, False]]
    assert mask_WL[mask_WL != 0].isneginf().all()


def test_padded_windows_attend_as_if_they_were_cut_at_the_border():
    """Padded positions are neither keys nor queries: a window at the border equals attention without them."""
    stage = StagePlan(0, (5, 7), 8, depth=1, heads=2, window=4, moa=False)
    attention = WindowAttention(stage, ModelConfig()).double()
    x_BHWC = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    out = attention(x_BHWC)
    assert out.shape == x_BHWC.shape
    corner = x_BHWC[:, 4:, 4:]  # one row, three columns of the last window
    q, k, v = attention.qkv(corner).view(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
    bias = attention.position_bias(q)[:, :3, :3]
    expected = ((q @ k.transpose(-2, -1)) * 4**-0.5 + bias).softmax(-1) @ v
    torch.testing.assert_close(out[:, 4:, 4:], attention.proj(expected.permute(0, 2, 1, 3).reshape(2, 1, 3, 8)))


def test_patches_projected_at_once_are_a_convolution():
    for size, stride, padding in ((4, 4, 0), (6, 4, 1), (3, 1, 1), (5, 3, 2)):
        conv = nn.Conv2d(3, 5, size, stride, padding).double()
        x_BHWC = torch.randn(2, 12, 15, 3, dtype=torch.float64, requires_grad=True)
        out, expected = project_patches(x_BHWC, conv), conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        leaves = [x_BHWC, conv.weight, conv.bias]
        for own, other in zip(
            torch.autograd.grad(out.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    drop, given = DropPath(0.25).train(), []
    x = torch.arange(1.0, 4001.0)[:, None, None].expand(-1, 2, 3)
    out = drop(lambda x: given.append(x) or 2 * x, x)
    ratio = out / (2 * x)
    assert ((ratio == 0).all((1, 2)) | torch.isclose(ratio, torch.tensor(1 / 0.75)).all((1, 2))).all()
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(given[0], x[(out != 0).all((1, 2))])  # the other samples are not computed
    assert drop.eval()(lambda x: x, x) is x
    assert DropPath(0.0).train()(lambda x: x, x) is x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
def test_skipping_dropped_samples_changes_no_value_and_no_gradient(rate):
    """Against a mask over the whole branch, in float64; at 0.99 the branch is often dropped for all 3 samples."""
    drop, branch = DropPath(rate).train(), nn.Linear(4, 4).double()
    for seed in range(20):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(seed)
        mask = torch.rand(3).lt(1 - rate).double()[:, None] / (1 - rate)
        torch.manual_seed(seed)
        out, expected = drop(branch, x), branch(x) * mask
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        leaves = [x, branch.weight, branch.bias]
        weights = torch.randn_like(out)
        for own, other in zip(
            torch.autograd.grad((out * weights).sum(), leaves),  # every parameter has a gradient
            torch.autograd.grad((expected * weights).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "bias"), [((8, 8), (2, 16, 16)), ((7, 9), (6 * 2, 16, 16))])
def test_bias_and_mask_do_not_grow_with_the_batch(size, bias):
    shapes = []
    layer = WindowAttention(StagePlan(0, size, 8, 1, 2, 4, False), ModelConfig())
    layer.attend = lambda q, k, v, bias: shapes.append(tuple(bias.shape)) or attend(q, k, v, bias)
    for batch in (1, 5):
        layer(torch.randn(batch, *size, 8))
    assert shapes == [bias, bias]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stochastic_depth_is_masked_on_a_gpu_and_waits_for_nothing(no_waits):
    drop, x = DropPath(0.25).cuda().train(), torch.rand(4000, 2, 3, device="cuda", requires_grad=True)
    for way in (lambda: drop.add(lambda x: 2 * x, x), lambda: x + drop(lambda x: 2 * x, x)):
        way()
        with no_waits():
            out = way()
            (gradient,) = torch.autograd.grad(out.sum(), x)
        kept = (gradient - 1) / (2 / 0.75)
        assert ((kept - kept.round()).abs() < 1e-5).all()
        assert (kept == kept[:, :1, :1]).all()
        assert kept.mean().item() == pytest.approx(0.75, abs=0.05)
        torch.testing.assert_close(out, gradient * x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_under_autocast_is_as_exact_as_its_dtype(dtype):
    norm, exact = LayerNorm(96).cuda(), nn.LayerNorm(96).double()
    nn.init.normal_(norm.weight, 1, 0.2)
    exact.load_state_dict(norm.state_dict())
    x, upstream = torch.randn(2, 4000, 96) * 3 + 1
    own = x.cuda().to(dtype).requires_grad_()
    with torch.autocast("cuda", dtype):
        out = norm(own)
    out.backward(upstream.cuda().to(dtype))
    other = own.detach().double().cpu().requires_grad_()
    exact(other).backward(upstream.double())
    assert out.dtype == dtype
    pairs = [(out, exact(other)), (own.grad, other.grad), (norm.weight.grad, exact.weight.grad)]
    for mine, theirs in [*pairs, (norm.bias.grad, exact.bias.grad)]:
        assert (mine.double().cpu() - theirs).norm() < 0.01 * theirs.norm()


def test_stochastic_depth_follows_the_seed():
    drop, x = DropPath(0.5).train(), torch.ones(64, 1)
    outs = []
    for _ in range(2):
        torch.manual_seed(7)
        outs.append(drop(nn.Identity(), x))
    assert torch.equal(*outs)


def test_dropout_reaches_attention_and_mlp():
    stage = StagePlan(0, (4, 4), 8, depth=1, heads=2, window=4, moa=False)
    block = LocalBlock(stage, ModelConfig(dropout=0.9), drop_path=0.0)
    rates = [module.p for module in block.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.9] * 3
    x_BHWC = torch.randn(1, 4, 4, 8)
    assert not torch.equal(block.train()(x_BHWC), block(x_BHWC))
    assert torch.equal(block.eval()(x_BHWC), block(x_BHWC))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stochastic_depth_can_select_samples_on_a_gpu():
    drop, x = DropPath(0.25).cuda().train(), torch.rand(400, 2, device="cuda")
    drop.method = "select"
    out = drop.add(lambda x: 2 * x, x)
    kept = (out - x) / (2 * x / 0.75)
    assert ((kept - kept.round()).abs() < 1e-4).all()
