"""Memory of a training step, compared with the same network written formula by formula."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moa_train.model.registry import create_model
from moa_train.model.summary import PeakMemory, training_cost
from moa_train.model.without_memory import WithoutMemory
from moa_train.schema import MoaConfig, ModelConfig

MOA_T = ModelConfig(drop_path=0.0, moa=MoaConfig(drop_path=0.0))
IMAGES = 32  # enough for activations to outweigh weights, gradients and optimizer states by far
DTYPES = [torch.float32, torch.bfloat16]


class Plain:
    """The paper form of the network from its state dict, formula by formula."""

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
        self.weights, self.config = weights, config

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def convolve(self, name: str, x_BHWC: Tensor, stride: int, padding: int = 0) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, bias, stride, padding).permute(0, 2, 3, 1)

    def attend(
        self,
        name: str,
        q_GLC: Tensor,
        k_GLC: Tensor,
        v_GLC: Tensor,
        grid: tuple[int, int],
        mask_GL: Tensor | None = None,
    ) -> Tensor:
        table_RRN = self.weights[f"{name}.relative_position_bias_table"]
        row_L, column_L = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        down_LL = row_L[:, None] - row_L[None, :] + grid[0] - 1
        right_LL = column_L[:, None] - column_L[None, :] + grid[1] - 1
        q_GNLD, k_GNLD, v_GNLD = (
            rearrange(t_GLC, "g l (n d) -> g n l d", n=table_RRN.shape[-1]) for t_GLC in (q_GLC, k_GLC, v_GLC)
        )
        scores_GNLL = q_GNLD @ k_GNLD.transpose(-2, -1) * q_GNLD.shape[-1] ** -0.5
        scores_GNLL = scores_GNLL + table_RRN[down_LL, right_LL].permute(2, 0, 1)
        if mask_GL is not None:
            scores_GNLL = scores_GNLL + mask_GL[:, None, None, :]
        return self.linear(f"{name}.proj", rearrange(scores_GNLL.softmax(-1) @ v_GNLD, "g n l d -> g l (n d)"))

    def pad(self, x_BHWC: Tensor, size: int) -> Tensor:
        return F.pad(x_BHWC, (0, 0, 0, -x_BHWC.shape[2] % size, 0, -x_BHWC.shape[1] % size))

    def local_block(self, name: str, x_BHWC: Tensor, window: int) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        cut = "b (h y) (w x) c -> (b h w) (y x) c"
        qkv_BHWC = self.pad(self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x_BHWC)), window)
        qkv_GLC = rearrange(qkv_BHWC, cut, y=window, x=window)
        mask_GL = None
        if qkv_BHWC.shape[1:3] != (height, width):
            real_BHWC = self.pad(torch.ones(*x_BHWC.shape[:3], 1, dtype=qkv_GLC.dtype), window)
            mask_GL = rearrange(real_BHWC.log(), cut, y=window, x=window)[:, :, 0]
        x_GLC = self.attend(f"{name}.attn", *qkv_GLC.chunk(3, -1), (window, window), mask_GL)
        sizes = {"b": len(x_BHWC), "h": qkv_BHWC.shape[1] // window, "y": window}
        update_BHWC = rearrange(x_GLC, "(b h w) (y x) c -> b (h y) (w x) c", **sizes)
        x_BHWC = x_BHWC + update_BHWC[:, :height, :width]
        return x_BHWC + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x_BHWC))

    def moa(self, name: str, x_BHWC: Tensor, window: int, overlap: int = 1) -> Tensor:
        thin_BHWc = self.pad(self.linear(f"{name}.reduce", self.norm(f"{name}.norm1", x_BHWC)), window)
        q_BhwC = self.convolve(f"{name}.q", thin_BHWc, window)
        kv_BhwC = self.convolve(f"{name}.kv", thin_BHWc, window, overlap)
        grid = (q_BhwC.shape[1], q_BhwC.shape[2])
        x_BLC = self.attend(name, q_BhwC.flatten(1, 2), *kv_BhwC.flatten(1, 2).chunk(2, -1), grid)
        token_BhwC = q_BhwC + x_BLC.unflatten(1, grid)
        token_BhwC = token_BhwC + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", token_BhwC))
        update_BhwC = self.linear(f"{name}.expand", token_BhwC)
        update_BHWC = update_BhwC.repeat_interleave(window, dim=1).repeat_interleave(window, dim=2)
        return x_BHWC + update_BHWC[:, : x_BHWC.shape[1], : x_BHWC.shape[2]]

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        x_BHWC = self.convolve("patch_embed.proj", images_BCHW.permute(0, 2, 3, 1), self.config.patch_size)
        x_BHWC = self.norm("patch_embed.norm", x_BHWC)
        for stage, depth in enumerate(self.config.depths):
            window = min(self.config.window, x_BHWC.shape[1])
            for block in range(depth):
                x_BHWC = self.local_block(f"layers.{stage}.blocks.{block}", x_BHWC, window)
            if stage < len(self.config.depths) - 1:
                x_BHWC = self.moa(f"layers.{stage}.moa", x_BHWC, window)
                x_BHWC = rearrange(self.pad(x_BHWC, 2), "b (h row) (w col) c -> b h w (col row c)", row=2, col=2)
                x_BHWC = self.norm(f"layers.{stage}.downsample.norm", x_BHWC)
                x_BHWC = self.linear(f"layers.{stage}.downsample.reduction", x_BHWC)
        return self.linear("head", self.norm("norm", x_BHWC).mean((1, 2)))


Forward = Callable[[Tensor], Tensor]


def plain(model: nn.Module, config: ModelConfig) -> Forward:
    return Plain(dict(model.named_parameters()), config)


def loss_of_a_batch(forward: Forward, dtype: torch.dtype, size: int) -> Tensor:
    """Return only the loss, so that the images can be freed, as in a training step."""
    images_BCHW, labels_B = torch.empty(IMAGES, 3, size, size), torch.empty(IMAGES, dtype=torch.int64)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits_BK = forward(images_BCHW)
    return F.cross_entropy(logits_BK.float(), labels_B)


def bytes_of_a_step(
    dtype: torch.dtype, size: int, *, checkpointing: bool = False, straightforward: bool = False
) -> int:
    """Return the peak memory of an AdamW update in bytes, weights included, kernel for kernel as on a CPU.

    The tensors have no memory, so that a model of realistic size can be used. test_summary compares the estimate with
    the memory of a real process.
    """
    with torch.device("meta"):
        model = create_model(replace(MOA_T, checkpointing=checkpointing), image_size=(size, size), num_classes=1000)
    with WithoutMemory("cpu") as without, PeakMemory() as memory:
        without.hollow(model)
        forward = plain(model, MOA_T) if straightforward else model
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # the first step creates its state
        optimizer.zero_grad()
        loss_of_a_batch(forward, dtype, size).backward()
        optimizer.step()
    return memory.peak


@pytest.mark.parametrize("size", [32, 36])  # maps that divide into windows, and maps that are padded
def test_the_straightforward_version_is_the_same_network(size):
    config = ModelConfig(
        patch_size=2, embed_dim=16, depths=[1, 2, 1], heads=[1, 2, 2], window=4, moa=MoaConfig(reduction=4)
    )
    model = create_model(config, image_size=(size, size), num_classes=5).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    images_BCHW = torch.randn(2, 3, size, size, dtype=torch.float64)
    ours, theirs = model(images_BCHW), plain(model, config)(images_BCHW)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for mine, its in zip(
        *(torch.autograd.grad(logits.square().sum(), model.parameters()) for logits in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [224, 256])  # maps of 224 pixels divide into windows of 14, maps of 256 are padded
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_takes_no_more_than_the_straightforward_one_and_half_of_it_with_checkpointing(dtype, size):
    ours, recomputed = (bytes_of_a_step(dtype, size, checkpointing=checkpointing) for checkpointing in (False, True))
    theirs = bytes_of_a_step(dtype, size, straightforward=True)
    print(f"{ours / 2**20:.0f} MiB, {ours / theirs:.3f} of straightforward; checkpointing {recomputed / ours:.3f}")
    assert ours < 1.01 * theirs  # temporaries at the peak differ by one or two maps
    assert recomputed <= 0.5 * ours
    for bytes_, checkpointing in ((ours, False), (recomputed, True)):
        config, geometry = (
            replace(MOA_T, checkpointing=checkpointing),
            {"image_size": (size, size), "num_classes": 1000},
        )
        estimate = training_cost(config, **geometry, batch_size=IMAGES, dtype=dtype).memory
        assert estimate == pytest.approx(bytes_, rel=0.05)
