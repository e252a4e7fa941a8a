"""The MOA block as its authors published it, with compatible weights and matching results.

It differs from the paper's text (`moa.MOABlock`): memory is *reinterpreted* between layouts, never transposed.
A tensor (B, H, W, C) is read as if it were (B, C, H, W), so a "window" is a slice of channels over a strip of the
image, and the token of a window is not added to that window's pixels. A 3x3 convolution replaces the MLP.
Every `reshape` below that changes the meaning of a dimension is intentional. See docs/MODEL.md.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moa_train.model.attention import BiasedAttention
from moa_train.model.layers import DropPath, LayerNorm, LocalStage, PatchMerging
from moa_train.model.stages import StagePlan
from moa_train.schema import ModelConfig


class PublishedAttention(BiasedAttention):
    """Attention from the patches of a reinterpreted map to overlapping patches: (B, C, H, W) -> (B, h w, C)."""

    def __init__(self, stage: StagePlan, config: ModelConfig) -> None:
        super().__init__(stage.heads, stage.windows, published_layout=True)
        dim, overlap, self.window = stage.dim, config.moa.overlap, stage.window
        self.overlap, thin = overlap, dim // config.moa.reduction
        self.pre_conv = nn.Conv2d(dim, thin, kernel_size=1)
        self.q = nn.Linear(self.window**2 * thin, dim)
        self.kv = nn.Linear((self.window + 2 * overlap) ** 2 * thin, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, y_BCHW: Tensor) -> Tensor:
        """Convert the reinterpreted map (B, C, H, W) to one token per window, (B, L, C)."""
        P, K, L = self.window, self.window + 2 * self.overlap, self.grid[0] * self.grid[1]
        thin_BcHW = self.pre_conv(y_BCHW)
        B = thin_BcHW.shape[0]
        patches = rearrange(thin_BcHW, "b c (h y) (w x) -> b (y x c) h w", y=P, x=P)
        q_BLC = self.q(patches.reshape(B, L, -1))
        overlapping = F.unfold(thin_BcHW, K, padding=self.overlap, stride=P)  # (B, c K K, L)
        kv_BLC = self.kv(overlapping.reshape(B, L, -1))
        q_BNLD = rearrange(q_BLC, "b l (n d) -> b n l d", n=self.heads)
        k_BNLD, v_BNLD = rearrange(kv_BLC, "b l (two n d) -> two b n l d", two=2, n=self.heads).unbind(0)
        x_BNLD = self.attend(q_BNLD, k_BNLD, v_BNLD, self.position_bias(q_BNLD))
        return self.dropout(self.proj(rearrange(x_BNLD, "b n l d -> b l (n d)")))


class PublishedStage(LocalStage):
    """A stage that ends with the published MOA block; parameter names and their order match the published weights."""

    def __init__(self, stage: StagePlan, blocks: Sequence[nn.Module], config: ModelConfig, *, drop_path: float) -> None:
        super().__init__(stage, blocks, None, config)
        self.glb_attn = PublishedAttention(stage, config)
        self.post_conv = nn.Conv2d(stage.dim, stage.dim, kernel_size=3, padding=1)
        self.norm1 = LayerNorm(stage.dim)
        self.norm2 = LayerNorm(stage.dim)
        self.drop_path = DropPath(drop_path)
        self.downsample = PatchMerging(stage.dim)

    def global_attention(self, x_BHWC: Tensor) -> Tensor:
        """Apply the published block, (B, H, W, C) in and out."""
        shape_BCHW = (-1, x_BHWC.shape[3], *x_BHWC.shape[1:3])
        x_BCHW = x_BHWC.reshape(shape_BCHW)
        x_BCHW = x_BCHW + self.drop_path(self.tokens_in_windows, x_BHWC).reshape(shape_BCHW)
        z_BHWC = self.norm2(x_BCHW.reshape(x_BHWC.shape))
        z_BCHW = z_BHWC.reshape(shape_BCHW)
        return z_BHWC + self.drop_path(self.post_conv, z_BCHW).reshape(x_BHWC.shape)

    def tokens_in_windows(self, x_BHWC: Tensor) -> Tensor:
        """Add to each "window" of the normalized map its token: (B, H, W, C) -> (B, L, P, P, C)."""
        B, H, W, C = x_BHWC.shape
        P = self.glb_attn.window
        y_BHWC = self.norm1(x_BHWC)
        g_BLC = self.glb_attn(y_BHWC.reshape(B, C, H, W))
        return y_BHWC.reshape(B, -1, P, P, C) + g_BLC[:, :, None, None, :]
