"""Attention with a relative position bias, shared by all attention layers of this package.

Shape suffixes, used throughout the package: B images, H W height and width of a feature map, C channels, G groups
that attend independently (windows of all images, or full images), N heads, L tokens per group, D channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONG_ROW = 32
"""With at least this many tokens per row, CUDA's attention kernels are faster than plain matrix products."""

# Intel servers have AMX since 2023. In torch 2.9, only this private function reports it.
HAS_MATRIX_TILES: bool = torch.cpu._is_amx_tile_supported()


class BiasedAttention(nn.Module):
    """``softmax(q kᵀ / √D + bias) v`` with a learned bias for every head and relative position on a grid.

    The table (2h - 1, 2w - 1, N) has a cell for every offset between two positions of the ``h x w`` grid.
    ``relative_position_index`` (L, L) maps each pair of tokens to its cell. ``published_layout`` flattens the table
    to two dimensions and keeps the index in the state dict, to match the published files.
    """

    relative_position_index: Tensor
    kernel = "auto"
    eval_kernel = "auto"

    def __init__(self, heads: int, grid: tuple[int, int], *, published_layout: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        table_RRN = torch.zeros(2 * grid[0] - 1, 2 * grid[1] - 1, heads)
        self.relative_position_bias_table = nn.Parameter(table_RRN.flatten(0, 1) if published_layout else table_RRN)
        self.register_buffer("relative_position_index", relative_position_index(*grid), persistent=published_layout)

    def attend(self, q_GNLD: Tensor, k_GNLD: Tensor, v_GNLD: Tensor, bias: Tensor) -> Tensor:
        """Call `attend` with the kernel that `set_kernels` chose for training or for evaluation."""
        return attend(q_GNLD, k_GNLD, v_GNLD, bias, self.kernel if self.training else self.eval_kernel)

    def position_bias(self, like: Tensor) -> Tensor:
        """Look up the bias (N, L, L) and return it in the dtype of ``like``.

        The lookup runs in the table's fp32, so that the gradient's terms, up to L per cell, are also summed in fp32.
        """
        table_RN = self.relative_position_bias_table.view(-1, self.heads)
        # With a single head, the transpose would give the gradient different strides than the table; DDP would warn.
        table_NR = table_RN.t() if self.heads > 1 else table_RN.view(1, -1)
        L = self.relative_position_index.shape[0]
        return table_NR.index_select(1, self.relative_position_index.view(-1)).view(self.heads, L, L).to(like.dtype)


def relative_position_index(height: int, width: int) -> Tensor:
    """Return the row-major index of the table cell of every query-key pair: (L, L), L = height x width."""
    row_L, column_L = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row_L, column_L = row_L.flatten(), column_L.flatten()
    down_LL = row_L[:, None] - row_L[None, :] + height - 1
    right_LL = column_L[:, None] - column_L[None, :] + width - 1
    return down_LL * (2 * width - 1) + right_LL


def attend(q_GNLD: Tensor, k_GNLD: Tensor, v_GNLD: Tensor, bias: Tensor, kernel: str = "auto") -> Tensor:
    """Return ``softmax(q kᵀ / √D + bias) v`` (G, N, L, D); ``bias`` is (N, L, L), or (G, N, L, L) if it contains masks.

    ``kernel`` is fused (PyTorch's attention), plain (matrix products) or auto: FlexAttention in compiled code,
    otherwise fused, or plain where a rule expects it to be faster. Measurements: docs/GPU.md, docs/PERFORMANCE.md.
    """
    if kernel == "auto" and flex_pays(q_GNLD, bias):
        from torch.nn.attention.flex_attention import flex_attention

        bias_NLL = bias.float()  # the gradient is summed over groups in this dtype
        out_GNLD = flex_attention(
            q_GNLD, k_GNLD, v_GNLD, score_mod=lambda score, group, head, query, key: score + bias_NLL[head, query, key]
        )
        assert isinstance(out_GNLD, Tensor)
        return out_GNLD
    if kernel == "fused" or (kernel == "auto" and fused_pays(q_GNLD, bias)):
        return F.scaled_dot_product_attention(q_GNLD, k_GNLD, v_GNLD, aligned(bias if bias.dim() == 4 else bias[None]))
    # Autocast would promote the softmax and the scores, which are the largest tensor of the model, to fp32.
    with torch.autocast(q_GNLD.device.type, enabled=False):
        # matmul requires contiguous heads. It would copy the scaled q again, and k in transposed order, slowly.
        scores_GNLL = (q_GNLD.contiguous() * q_GNLD.shape[-1] ** -0.5) @ k_GNLD.contiguous().transpose(-2, -1)
        weights_GNLL = scores_GNLL.add_(bias).softmax(-1, dtype=softmax_dtype(scores_GNLL))
        return weights_GNLL.to(v_GNLD.dtype) @ v_GNLD


def softmax_dtype(scores_GNLL: Tensor) -> torch.dtype:
    """Return the dtype of the softmax: on a CPU, short rows take three times as long in bf16 as in fp32.

    The CPU kernel processes 32 bf16 values at once, and the remainder of a row one by one.
    """
    slow = scores_GNLL.device.type == "cpu" and scores_GNLL.shape[-1] < 64
    return torch.float32 if slow and scores_GNLL.dtype == torch.bfloat16 else scores_GNLL.dtype


def flex_pays(q_GNLD: Tensor, bias: Tensor) -> bool:
    """Return whether FlexAttention is the fastest kernel: in code compiled for a GPU, for long rows.

    FlexAttention sums the bias gradient inside the kernel, whereas the fused kernel writes it out for every group. The
    sum uses atomic operations in varying order, so deterministic runs cannot use FlexAttention.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and q_GNLD.device.type == "cuda"
        and q_GNLD.shape[-2] >= LONG_ROW
        and q_GNLD.shape[-1] >= 16
        and bias.dim() == 3
        and not torch.are_deterministic_algorithms_enabled()
    )


def fused_pays(q_GNLD: Tensor, bias: Tensor) -> bool:
    """Return whether the fused kernel is faster than plain matrix products.

    On a GPU it is faster except for short rows, which leave its tiles of 64 tokens mostly empty. On a CPU, a bias that
    requires a gradient takes a slow path, and without matrix tiles its bf16 products are slower than oneDNN's.
    """
    if q_GNLD.device.type == "meta":  # only shapes matter, and autocast does not support this device
        return True
    if q_GNLD.device.type != "cpu":
        return q_GNLD.device.type != "cuda" or q_GNLD.shape[-2] >= LONG_ROW
    needs_gradient = bias.requires_grad and torch.is_grad_enabled()
    return not needs_gradient and (HAS_MATRIX_TILES or q_GNLD.dtype != torch.bfloat16)


def aligned(bias: Tensor) -> Tensor:
    """Pad the row stride of a CUDA bias (..., L, L) to a multiple of 16 elements, as the fused kernels require.

    PyTorch would make the same copy for windows of 196 tokens, but only after expanding the bias to all groups.
    """
    if bias.device.type == "cpu" or bias.shape[-1] % 16 == 0:
        return bias
    L = bias.shape[-1]
    return F.pad(bias, (0, -L % 16))[..., :L]
