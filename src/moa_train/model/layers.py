"""Layers of a local-window Transformer. Feature maps are (B, H, W, C) throughout (suffixes: see `attention`)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moa_train.model.attention import BiasedAttention
from moa_train.model.stages import StagePlan
from moa_train.runtime.device import to_device
from moa_train.schema import ModelConfig


class LayerNorm(nn.LayerNorm):
    """Layer normalization that reads and writes bf16 or fp16 under CUDA autocast, with statistics in fp32.

    Autocast would run it entirely in fp32, with twice the memory traffic and casts of the input and the output.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        if x.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(
                x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
            )


class PatchEmbedding(nn.Module):
    """Cut images (B, 3, S, S) into patches, project each to C channels, and normalize: (B, S/patch, S/patch, C).

    Images whose sides are not multiples of the patch size are padded with zeros at the right and the bottom.
    """

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.norm = LayerNorm(dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Convert images (B, 3, H, W) to a feature map (B, H/patch, W/patch, C)."""
        images_BHWC = pad_to_multiple(images_BCHW.permute(0, 2, 3, 1), self.patch)
        return self.norm(project_patches(images_BHWC, self.proj))


class ConvStem(nn.Sequential):
    """Convert images (B, 3, S, S) to the same maps as `PatchEmbedding` by 3x3 convolutions, each of which halves them.

    Channels double from layer to layer (Xiao et al., "Early convolutions help Transformers see better", 2021; with
    LayerNorm, which unlike batch normalization treats samples independently).

    Args:
        patch: side of a patch in pixels, a power of two.
        dim: channels C of the last map.
        blocks: number of residual convolutions at each resolution, after it has been halved.
    """

    def __init__(self, patch: int, dim: int, blocks: int) -> None:
        count = patch.bit_length() - 1
        layers: list[nn.Module] = []
        for before, after in pairwise([3, *(dim >> left for left in range(count - 1, -1, -1))]):
            layers += [nn.GELU()] * bool(layers) + [Conv3x3(before, after, stride=2)]
            layers += [*(ConvBlock(after) for _ in range(blocks)), LayerNorm(after)]
        super().__init__(*layers)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Convert images (B, 3, H, W) to a feature map (B, H/patch, W/patch, C)."""
        return super().forward(images_BCHW.permute(0, 2, 3, 1))


class Conv3x3(nn.Linear):
    """A 3x3 convolution whose weight is kept as a matrix (C', 9C), so that Muon updates it like one."""

    def __init__(self, dim: int, out: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(9 * dim, out, bias=bias)
        self.stride = stride

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H/stride, W/stride, C'), rounded up."""
        kernel = self.weight.unflatten(1, (-1, 3, 3))
        x_BCHW = F.conv2d(x_BHWC.permute(0, 3, 1, 2), kernel, self.bias, self.stride, padding=1)
        return x_BCHW.permute(0, 2, 3, 1)


class ConvBlock(nn.Sequential):
    """A residual block of LayerNorm, GELU and a 3x3 convolution; (B, H, W, C) in and out."""

    def __init__(self, dim: int) -> None:
        super().__init__(LayerNorm(dim), nn.GELU(), Conv3x3(dim, dim))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Add the convolution to its input."""
        return x_BHWC + super().forward(x_BHWC)


class DepthwiseConv(nn.Conv2d):
    """A 3x3 convolution of each channel, added to its input: (B, H, W, C) in and out."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Add a weighted sum of each position's neighbors."""
        return x_BHWC + super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Halve the map and double its channels: concatenate 2x2 neighbors, LayerNorm(4C), Linear 4C -> 2C.

    The neighbors are in the order (0,0) (1,0) (0,1) (1,1) as (row, column). Odd sides are padded with zeros.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(4 * dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H/2, W/2, 2C)."""
        x_BHWC = pad_to_multiple(x_BHWC, 2)
        x_BHWC = rearrange(x_BHWC, "b (h row) (w col) c -> b h w (col row c)", row=2, col=2)
        return self.reduction(self.norm(x_BHWC))


class ConvMerging(nn.Sequential):
    """Halve the map and double its channels by LayerNorm and a 3x3 convolution; (B, H, W, C) to (B, H/2, W/2, 2C)."""

    def __init__(self, dim: int) -> None:
        super().__init__(LayerNorm(dim), Conv3x3(dim, 2 * dim, stride=2, bias=False))


class WindowAttention(BiasedAttention):
    """Multi-head self-attention within windows of w x w positions; (B, H, W, C) in and out.

    Maps whose sides are not multiples of w are padded at the right and the bottom. Padded positions are masked as keys
    and cropped as queries, so they do not affect the result.
    """

    padding_mask: Tensor | None

    def __init__(self, stage: StagePlan, config: ModelConfig) -> None:
        window = stage.window
        super().__init__(stage.heads, (window, window), published_layout=config.moa.form == "published")
        self.window = window
        self.qkv = nn.Linear(stage.dim, 3 * stage.dim)
        self.proj = nn.Linear(stage.dim, stage.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("padding_mask", padding_mask(stage.map_size, window), persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Attend within each window; (B, H, W, C) in and out."""
        q_GNLD, k_GNLD, v_GNLD = self.to_windows(self.qkv(x_BHWC))
        bias_NLL = self.position_bias(q_GNLD)
        if self.padding_mask is not None:
            bias_NLL = (bias_NLL + self.padding_mask.to(bias_NLL.dtype)[:, None, None, :]).flatten(0, 1)
        return self.dropout(self.proj(self.to_map(self.attend(q_GNLD, k_GNLD, v_GNLD, bias_NLL), x_BHWC.shape[1:3])))

    @property
    def groups(self) -> str:
        """The two leading dimensions in the attention: windows of all images, and heads.

        In a padded map, each window of an image has its own mask. The windows of an image then count as heads, so that
        neither the mask nor the bias is repeated for every image.
        """
        return "(b h w) n" if self.padding_mask is None else "b (h w n)"

    def to_windows(self, qkv_BHWC: Tensor) -> tuple[Tensor, ...]:
        """Split (B, H, W, 3C) into q, k and v (G, N, L, D), L = w x w positions; `groups` defines G and N."""
        # Split before copying: autograd saves k and v, and a joint copy would also keep the unscaled q in memory.
        parts = pad_to_multiple(qkv_BHWC, self.window).chunk(3, dim=-1)
        pattern = f"b (h y) (w x) (n d) -> {self.groups} (y x) d"
        return tuple(rearrange(part, pattern, n=self.heads, y=self.window, x=self.window) for part in parts)

    def to_map(self, x_GNLD: Tensor, map_size: Sequence[int]) -> Tensor:
        """Put windows (G, N, L, D) back into the map (B, H, W, C) and crop the padding."""
        height, width = map_size
        pattern = f"{self.groups} (y x) d -> b (h y) (w x) (n d)"
        rows, columns = -(-height // self.window), -(-width // self.window)
        x_BHWC = rearrange(x_GNLD, pattern, h=rows, w=columns, n=self.heads, y=self.window, x=self.window)
        return x_BHWC[:, :height, :width]


class MLP(nn.Sequential):
    """Two linear layers with GELU between them, on the last dimension; with ``conv``, also a depthwise convolution."""

    def __init__(self, dim: int, hidden: int, dropout: float, conv: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        if conv:
            self.conv = DepthwiseConv(hidden)
        self.gelu = nn.GELU()
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout2 = nn.Dropout(dropout)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drop a residual branch for some samples.

    The branch is dropped for each sample with probability ``rate``, and scaled by 1 / (1 - rate) for the others. On a
    CPU, the branch is computed only for the samples that keep it, since a block treats each sample independently. On a
    GPU, this is slower than computing all samples and masking the result, because samples have to be copied and shapes
    that change at every step prevent compilation.
    """

    keep: Tensor
    method = "auto"
    """mask, select, or auto: select on a CPU."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # Stored as a buffer so that compiled blocks that differ only in their drop rate share one graph.
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``branch(x)`` for ``x`` (B, ...), with zeros for the samples whose branch is dropped."""
        if not self.active:
            return branch(x)
        if self.selects(x):
            return self.select(branch, x)
        update = branch(x)
        return update * self.mask(update) / self.keep.to(update.dtype)

    def add(self, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``x + branch(x)`` for ``x`` (B, ...); samples whose branch is dropped do not change."""
        if not self.active or torch.compiler.is_compiling() or self.selects(x):
            return x + self(branch, x)
        update = branch(x)
        return torch.addcmul(x, update, self.mask(update), value=1 / (1 - self.rate))  # a single kernel

    @property
    def active(self) -> bool:
        """Whether branches may be dropped. A compiled graph serves all drop rates, so it always draws a mask."""
        return self.training and (torch.compiler.is_compiling() or self.rate > 0)

    def selects(self, x: Tensor) -> bool:
        """Return whether to compute the branch only for the samples that keep it. Compiled code always masks."""
        if torch.compiler.is_compiling():
            return False
        return x.device.type == "cpu" if self.method == "auto" else self.method == "select"

    def mask(self, update: Tensor) -> Tensor:
        """Draw 1 for each sample that keeps the branch and 0 for the others: (B, 1, ...)."""
        shape = (update.shape[0], *[1] * (update.dim() - 1))
        return (torch.rand(shape, device=update.device) < self.keep).to(update.dtype)

    def select(self, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute the branch only for the samples that keep it."""
        B, keep = x.shape[0], 1.0 - self.rate
        kept = torch.rand(B).lt(keep).nonzero().flatten()
        scale = 1.0 / keep
        if not len(kept):  # compute one sample anyway, so that all parameters get the gradient that DDP waits for
            kept, scale = torch.zeros(1, dtype=torch.int64), 0.0
        if len(kept) == B:
            return branch(x) * scale
        kept = to_device(kept, x.device)
        update = branch(x.index_select(0, kept))
        return update.new_zeros(B, *update.shape[1:]).index_add_(0, kept, update, alpha=scale)

    def extra_repr(self) -> str:
        """Show the drop rate when the model is printed."""
        return f"{self.rate:.3f}"


class LocalBlock(nn.Module):
    """A Transformer block whose attention stays within windows: pre-norm, residual, stochastic depth."""

    def __init__(self, stage: StagePlan, config: ModelConfig, *, drop_path: float) -> None:
        super().__init__()
        self.conv = DepthwiseConv(stage.dim) if "block" in config.conv else None
        self.norm1 = LayerNorm(stage.dim)
        self.attn = WindowAttention(stage, config)
        self.norm2 = LayerNorm(stage.dim)
        self.mlp = MLP(stage.dim, int(stage.dim * config.mlp_ratio), config.dropout, conv="mlp" in config.conv)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Mix positions within windows, then channels; (B, H, W, C) in and out."""
        if self.conv is not None:
            x_BHWC = self.conv(x_BHWC)
        x_BHWC = self.drop_path.add(lambda x_BHWC: self.attn(self.norm1(x_BHWC)), x_BHWC)
        return self.drop_path.add(lambda x_BHWC: self.mlp(self.norm2(x_BHWC)), x_BHWC)


class LocalStage(nn.Module):
    """Local blocks, followed by downsampling to the next stage (except in the last stage)."""

    def __init__(
        self, stage: StagePlan, blocks: Sequence[nn.Module], downsample: nn.Module | None, config: ModelConfig
    ) -> None:
        super().__init__()
        self.map_size = stage.map_size
        self.window = stage.window
        self.checkpointing = config.checkpointing
        # Convolutions mix neighboring windows, and padding would be computed in every layer.
        divides = all(side % self.window == 0 for side in self.map_size)
        self.stacked = divides and not {"block", "mlp"} & set(config.conv)
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Apply all blocks, but not the downsampling: (B, H, W, C) in and out.

        Unlike Swin's windows, these do not shift, so they are stacked once for all local blocks: in a map that is one
        window wide, every window is contiguous and can be cut out without a copy.
        """
        if self.stacked:
            x_BHWC = rearrange(x_BHWC, "b (h y) (w x) c -> b (h w y) x c", y=self.window, x=self.window)
        for block in self.blocks:
            x_BHWC = self.run(block, x_BHWC)
        if self.stacked:
            pattern = "b (h w y) x c -> b (h y) (w x) c"
            x_BHWC = rearrange(x_BHWC, pattern, h=self.map_size[0] // self.window, y=self.window)
        return self.run(self.global_attention, x_BHWC)

    def global_attention(self, x_BHWC: Tensor) -> Tensor:
        """Return the map unchanged. The stages of both MOA forms override this with attention between windows."""
        return x_BHWC

    def run(self, block: Callable[[Tensor], Tensor], x_BHWC: Tensor) -> Tensor:
        """Apply a block of this stage; with ``checkpointing``, recompute its activations in the backward pass."""
        return run_block(block, x_BHWC, recompute=self.checkpointing and self.training)


def run_block(block: Callable[[Tensor], Tensor], x: Tensor, *, recompute: bool) -> Tensor:
    """Apply a block; with ``recompute``, its activations are recomputed in the backward pass instead of stored."""
    return checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)


def project_patches(x_BHWC: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a convolution (square kernel, no dilation, no groups) as a matrix product of its patches: (B, h, w, C').

    If the stride is not much smaller than the kernel, this takes a third to half of the convolution's time on a CPU,
    including gradients.
    """
    size, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    if padding:
        x_BHWC = F.pad(x_BHWC, (0, 0, padding, padding, padding, padding))
    patches_BhwCKK = x_BHWC.unfold(1, size, stride).unfold(2, size, stride)
    return F.linear(patches_BhwCKK.flatten(3), conv.weight.flatten(1), conv.bias)


def pad_to_multiple(x_BHWC: Tensor, size: int) -> Tensor:
    """Pad height and width with zeros, at the bottom and the right, to the next multiples of ``size``."""
    down, right = -x_BHWC.shape[1] % size, -x_BHWC.shape[2] % size
    return F.pad(x_BHWC, (0, 0, 0, right, 0, down)) if down or right else x_BHWC


def padding_mask(map_size: tuple[int, int], window: int) -> Tensor | None:
    """Return a mask (windows of one image, L) with 0 in the map and -inf in the padding; None without padding."""
    if map_size[0] % window == 0 and map_size[1] % window == 0:
        return None
    real_HW = pad_to_multiple(torch.ones(1, *map_size, 1), window)[0, :, :, 0]
    real_WL = rearrange(real_HW, "(h y) (w x) -> (h w) (y x)", y=window, x=window)
    return torch.zeros_like(real_WL).masked_fill_(real_WL == 0, float("-inf"))
