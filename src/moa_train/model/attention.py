"""Attention with a relative position bias: the one product that every attention here is made of.

Letters of shapes, in this whole package: B images, H W height and width of a map, C channels, G groups that
attend among themselves (windows of all images, or whole images), N heads, L tokens of a group, D width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BiasedAttention(nn.Module):
    """``softmax(q kᵀ / √D + bias) v`` with a learned bias for every head and relative position on a grid.

    The table has ``(2h - 1) (2w - 1)`` rows, one per offset between two cells of the ``h x w`` grid, and a column
    per head. ``relative_position_index`` (L, L) says which row belongs to a pair of tokens; it is a constant, kept
    in the state dict only where the published files have it (``keep_index``).
    """

    relative_position_index: Tensor

    def __init__(self, heads: int, grid: tuple[int, int], *, keep_index: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        index_LL = relative_position_index(*grid)
        self.register_buffer("relative_position_index", index_LL, persistent=keep_index)

    def position_bias(self, like: Tensor) -> Tensor:
        """Look the bias (N, L, L) up, in the dtype of ``like``: cast before the copy, so that less is moved."""
        table_NR = self.relative_position_bias_table.to(like.dtype).t()
        L = self.relative_position_index.shape[0]
        return table_NR.index_select(1, self.relative_position_index.flatten()).view(self.heads, L, L)


def relative_position_index(height: int, width: int) -> Tensor:
    """Return the table row (L, L) of every query-key pair, L = height x width cells counted row by row."""
    row_L, column_L = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row_L, column_L = row_L.flatten(), column_L.flatten()
    down_LL = row_L[:, None] - row_L[None, :] + height - 1
    right_LL = column_L[:, None] - column_L[None, :] + width - 1
    return down_LL * (2 * width - 1) + right_LL


def attend(q_GNLD: Tensor, k_GNLD: Tensor, v_GNLD: Tensor, bias: Tensor) -> Tensor:
    """Return ``softmax(q kᵀ / √D + bias) v`` (G, N, L, D); ``bias`` is (N, L, L), or (G, N, L, L) with a mask in it.

    This is the seam where the kernel is chosen. A bias that needs a gradient sends PyTorch's fused attention
    to its slow path on the CPU; a plain product in the dtype of ``q`` is about twice as fast there.
    """
    if q_GNLD.device.type == "cpu" and bias.requires_grad and torch.is_grad_enabled():
        return _plain_product(q_GNLD, k_GNLD, v_GNLD, bias)
    return F.scaled_dot_product_attention(q_GNLD, k_GNLD, v_GNLD, bias if bias.dim() == 4 else bias[None])


def _plain_product(q_GNLD: Tensor, k_GNLD: Tensor, v_GNLD: Tensor, bias: Tensor) -> Tensor:
    # Autocast would promote the softmax, and with it the scores, the largest tensor of the model, to fp32.
    with torch.autocast(q_GNLD.device.type, enabled=False):
        scores_GNLL = (q_GNLD * q_GNLD.shape[-1] ** -0.5) @ k_GNLD.transpose(-2, -1) + bias
        return scores_GNLL.softmax(-1) @ v_GNLD
