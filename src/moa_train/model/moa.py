"""The MOA block of the paper, which adds global context to window attention by a small attention over all windows.

Patel, Bur, Li, Wang: "Aggregating Global Features into Local Vision Transformer", arXiv 2201.12903.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from moa_train.model.attention import BiasedAttention
from moa_train.model.layers import MLP, DropPath, LayerNorm, LocalStage, pad_to_multiple, project_patches
from moa_train.model.stages import StagePlan
from moa_train.schema import ModelConfig


class MOABlock(BiasedAttention):
    """Multi-resolution overlapped attention (section 3.2): every window receives information from all windows.

    Windows of P x P positions become the queries, h x w = H/P x W/P tokens. Patches that extend ``overlap`` positions
    beyond their window on each side become the keys and values. A map whose sides are not multiples of P is padded at
    the right and the bottom. ``reduction`` is the factor R by which channels are reduced before patches are projected.
    """

    def __init__(self, stage: StagePlan, config: ModelConfig, *, drop_path: float) -> None:
        super().__init__(stage.heads, stage.windows)
        dim, overlap, self.window = stage.dim, config.moa.overlap, stage.window
        thin = dim // config.moa.reduction
        self.norm1 = LayerNorm(dim)
        self.reduce = nn.Linear(dim, thin)
        self.q = nn.Conv2d(thin, dim, kernel_size=self.window, stride=self.window)
        self.kv = nn.Conv2d(thin, 2 * dim, kernel_size=self.window + 2 * overlap, stride=self.window, padding=overlap)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio), config.dropout)
        self.expand = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Add each window's token, computed from all windows, to the window's positions; (B, H, W, C) in and out."""
        update_BhwC = self.drop_path(lambda x_BHWC: self.expand(self.tokens(x_BHWC)), x_BHWC)
        return add_to_windows(x_BHWC, update_BhwC, self.window)

    def tokens(self, x_BHWC: Tensor) -> Tensor:
        """Return one token per window, (B, h, w, C), after attention over all windows and the MLP."""
        thin_BHWc = pad_to_multiple(self.reduce(self.norm1(x_BHWC)), self.window)
        q_BhwC = project_patches(thin_BHWc, self.q)
        k_BhwC, v_BhwC = project_patches(thin_BHWc, self.kv).chunk(2, dim=-1)
        x_BhwC = q_BhwC + self.dropout(self.proj(self.attention(q_BhwC, k_BhwC, v_BhwC)))
        return x_BhwC + self.mlp(self.norm2(x_BhwC))

    def attention(self, q_BhwC: Tensor, k_BhwC: Tensor, v_BhwC: Tensor) -> Tensor:
        """Apply multi-head attention over the grid of windows: a group is an image, and its tokens are the windows."""
        q_BNLD, k_BNLD, v_BNLD = (
            rearrange(t_BhwC, "b h w (n d) -> b n (h w) d", n=self.heads) for t_BhwC in (q_BhwC, k_BhwC, v_BhwC)
        )
        x_BNLD = self.attend(q_BNLD, k_BNLD, v_BNLD, self.position_bias(q_BNLD))
        return rearrange(x_BNLD, "b n (h w) d -> b h w (n d)", h=self.grid[0])


def add_to_windows(x_BHWC: Tensor, update_BhwC: Tensor, window: int) -> Tensor:
    """Add each token of (B, h, w, C) to all positions of its window in the map (B, H, W, C)."""
    height, width = x_BHWC.shape[1:3]
    if height % window == 0 and width % window == 0:  # broadcasting avoids storing the repeated tokens
        x_BhywxC = x_BHWC.unflatten(2, (-1, window)).unflatten(1, (-1, window))
        update_BhYwXC = update_BhwC[:, :, None, :, None]
        if x_BHWC.device.type == "cpu" and not torch.are_deterministic_algorithms_enabled():
            # The gradient is summed over columns after rows, four times as fast, but rounded differently.
            update_BhYwXC = update_BhYwXC.expand(-1, -1, -1, -1, window, -1)
        return (x_BhywxC + update_BhYwXC).flatten(3, 4).flatten(1, 2)
    repeated_BHWC = update_BhwC.repeat_interleave(window, dim=1).repeat_interleave(window, dim=2)
    return x_BHWC + repeated_BHWC[:, :height, :width]


class MOAStage(LocalStage):
    """A stage that ends with a MOA block."""

    def __init__(
        self,
        stage: StagePlan,
        blocks: Sequence[nn.Module],
        moa: MOABlock,
        downsample: nn.Module,
        config: ModelConfig,
    ) -> None:
        super().__init__(stage, blocks, downsample, config)
        self.moa = moa

    def global_attention(self, x_BHWC: Tensor) -> Tensor:
        """Apply the MOA block, (B, H, W, C) in and out."""
        return self.moa(x_BHWC)
