"""The MOA-Transformer: windows for what is near, one small attention over all windows for what is far.

Patel, Bur, Li, Wang: "Aggregating Global Features into Local Vision Transformer", arXiv 2201.12903.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moa_train.model.attention import BiasedAttention, attend
from moa_train.model.geometry import Stage
from moa_train.model.layers import MLP, DropPath, LocalBlock, PatchEmbedding, PatchMerging, pad_to_multiple


class MOABlock(BiasedAttention):
    """Multi-resolution overlapped attention (section 3.2): every window receives what all windows contain.

    Windows of P x P positions become the queries, h x w = H/P x W/P tokens; patches that overlap their neighbours
    by ``overlap`` positions a side become the keys and values. The map is padded at the right and the bottom where
    it does not divide. ``reduction`` makes the patches that are projected thinner, R times.
    """

    def __init__(
        self, stage: Stage, *, overlap: int, reduction: int, mlp_ratio: float, dropout: float, drop_path: float
    ) -> None:
        super().__init__(stage.heads, stage.windows)
        dim, self.window = stage.dim, stage.window
        thin = dim // reduction
        self.norm1 = nn.LayerNorm(dim)
        self.reduce = nn.Linear(dim, thin)
        self.q = nn.Conv2d(thin, dim, kernel_size=self.window, stride=self.window)
        self.kv = nn.Conv2d(thin, 2 * dim, kernel_size=self.window + 2 * overlap, stride=self.window, padding=overlap)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout)
        self.expand = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        tokens_BhwC = self.tokens(x_BHWC)
        update_BhwC = self.drop_path(self.expand(tokens_BhwC))
        return add_to_windows(x_BHWC, update_BhwC, self.window)

    def tokens(self, x_BHWC: Tensor) -> Tensor:
        """Return one token for every window, (B, h, w, C), after attention among all of them and the MLP."""
        thin_BHWc = pad_to_multiple(self.reduce(self.norm1(x_BHWC)), self.window)
        thin_BcHW = thin_BHWc.permute(0, 3, 1, 2)
        q_BhwC = self.q(thin_BcHW).permute(0, 2, 3, 1)
        k_BhwC, v_BhwC = self.kv(thin_BcHW).permute(0, 2, 3, 1).chunk(2, dim=-1)
        x_BhwC = q_BhwC + self.dropout(self.proj(self.attention(q_BhwC, k_BhwC, v_BhwC)))
        return x_BhwC + self.mlp(self.norm2(x_BhwC))

    def attention(self, q_BhwC: Tensor, k_BhwC: Tensor, v_BhwC: Tensor) -> Tensor:
        """Multi-head attention over the grid of windows: here a group is an image, its tokens are the windows."""
        q_BNLD, k_BNLD, v_BNLD = (
            rearrange(t_BhwC, "b h w (n d) -> b n (h w) d", n=self.heads) for t_BhwC in (q_BhwC, k_BhwC, v_BhwC)
        )
        x_BNLD = attend(q_BNLD, k_BNLD, v_BNLD, self.position_bias(q_BNLD))
        return rearrange(x_BNLD, "b n (h w) d -> b h w (n d)", h=self.grid[0])


def add_to_windows(x_BHWC: Tensor, update_BhwC: Tensor, window: int) -> Tensor:
    """Add each token of (B, h, w, C) to all positions of its own window of the map (B, H, W, C)."""
    height, width = x_BHWC.shape[1:3]
    if height % window == 0 and width % window == 0:  # broadcast, without writing the repeated tokens out
        x_BhywxC = x_BHWC.unflatten(2, (-1, window)).unflatten(1, (-1, window))
        return (x_BhywxC + update_BhwC[:, :, None, :, None]).flatten(3, 4).flatten(1, 2)
    repeated_BHWC = update_BhwC.repeat_interleave(window, dim=1).repeat_interleave(window, dim=2)
    return x_BHWC + repeated_BHWC[:, :height, :width]


class MOAStage(nn.Module):
    """Local blocks, what is global after them, and the way down to the next stage.

    A stage of either form has ``blocks``, ``global_attention`` (B, H, W, C in and out) and ``downsample``.
    """

    def __init__(self, blocks: Sequence[nn.Module], moa: MOABlock | None, downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.moa = moa
        self.downsample = downsample

    def global_attention(self, x_BHWC: Tensor) -> Tensor:
        """Apply the MOA block, where the stage has one."""
        return x_BHWC if self.moa is None else self.moa(x_BHWC)


class MOATransformer(nn.Module):
    """The whole network: patch embedding, stages with patch merging between them, LayerNorm, mean, linear head."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        stages: Sequence[Stage],
        *,
        image_size: tuple[int, int],
        in_channels: int,
        patch_size: int,
        num_classes: int,
        dropout: float,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.stages = tuple(stages)
        self.checkpointing = checkpointing
        self.patch_embed = PatchEmbedding(patch_size, in_channels, stages[0].dim)
        self.pos_drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(stages[-1].dim)
        self.head = nn.Linear(stages[-1].dim, num_classes)
        self.apply(init_weights)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W), of the size the model was built for, to logits (B, num_classes)."""
        return self.head(self.forward_features(images_BCHW)[-1].mean((2, 3)))

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return every stage's map (B, C, H, W), as it goes into patch merging; the last one after the LayerNorm."""
        assert images_BCHW.shape[2:] == self.image_size, f"built for {self.image_size}, got {images_BCHW.shape}"
        maps: list[Tensor] = []
        x_BHWC = self.pos_drop(self.patch_embed(images_BCHW))
        for layer in self.layers:
            for block in (*layer.blocks, layer.global_attention):
                x_BHWC = self.run_block(block, x_BHWC)
            maps.append((x_BHWC if layer.downsample else self.norm(x_BHWC)).permute(0, 3, 1, 2))
            if layer.downsample:
                x_BHWC = layer.downsample(x_BHWC)
        return maps

    def run_block(self, block: Callable[[Tensor], Tensor], x_BHWC: Tensor) -> Tensor:
        """Apply a block; with ``checkpointing`` its inner activations are recomputed in the backward pass."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x_BHWC, use_reentrant=False)
        return block(x_BHWC)


def init_weights(module: nn.Module) -> None:
    """Initialise: projections from a normal of deviation 0.02 cut at 2, biases 0, LayerNorm the identity."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
