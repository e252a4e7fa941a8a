"""The attention of a MOA-Transformer: the weights of every attention layer for given images, and where they point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from moa_train.model.attention import BiasedAttention, attend
from moa_train.model.layers import LocalStage, WindowAttention
from moa_train.model.moa import MOABlock, MOAStage
from moa_train.model.network import MOATransformer
from moa_train.model.published_block import PublishedStage


@dataclass(frozen=True)
class WindowMap:
    """The weights of one attention layer for B images: of a MOA block between windows, or of a local block.


    Attributes:
        name: name of the layer in the model.
        stage: its stage, counted from 0.
        weights: after the softmax, in the dtype of the model; every row sums to 1, and all indices are row-major.
            Between windows: (B, N, L, L), heads, query windows and key windows.
            Within windows: (B, L, N, P P, P P), windows, heads, query positions and key positions.
        grid: rows and columns of windows, L in total.
        window: side P of a window in positions.
        position: side of a position in pixels.
        overlap: positions by which keys extend beyond their window on each side.
        image_size: height and width of the images in pixels.
        is_spatial: whether windows are areas of the image. Those of the published MOA block are not.
    """

    name: str
    stage: int
    weights: Tensor
    grid: tuple[int, int]
    window: int
    position: int
    overlap: int
    image_size: tuple[int, int]
    is_spatial: bool = True

    def box(self, row: int, column: int, overlap: int = 0) -> tuple[int, int, int, int]:
        """Return the pixels (top, left, bottom, right) of a window, extended by ``overlap`` positions."""
        top, left = ((index * self.window - overlap) * self.position for index in (row, column))
        side = (self.window + 2 * overlap) * self.position
        height, width = self.image_size
        return max(0, top), max(0, left), min(height, top + side), min(width, left + side)

    def window_at(self, y: int, x: int) -> tuple[int, int]:
        """Return row and column of the window that contains a pixel."""
        side = self.window * self.position
        return min(y // side, self.grid[0] - 1), min(x // side, self.grid[1] - 1)


def attention_maps(model: nn.Module, images_BCHW: Tensor) -> tuple[list[WindowMap], list[WindowMap]]:
    """Return the attention weights between windows and within windows, each in the order of the layers.

    The weights are those of the forward pass: the kernel of the model computes them from its own queries, keys and
    bias, with the identity matrix in place of the values. Models other than MOA-Transformers have none.

    Args:
        model: in eval mode.
        images_BCHW: normalized images, on the device of the model.
    """
    if not isinstance(model, MOATransformer):
        return [], []
    with recording(model) as weights, torch.inference_mode():
        model(images_BCHW)
    between, within = [], []
    for index, stage in enumerate(model.layers):
        assert isinstance(stage, LocalStage)
        rows, columns = (-(-side // stage.window) for side in stage.map_size)
        size = images_BCHW.shape[2], images_BCHW.shape[3]
        position = model.patch_size * 2**index
        place = partial(
            WindowMap, stage=index, grid=(rows, columns), window=stage.window, position=position, image_size=size
        )
        for number, block in enumerate(stage.blocks):
            attention = block.attn
            assert isinstance(attention, WindowAttention)
            pattern = "(b g) n q k -> b g n q k" if attention.padding_mask is None else "b (g n) q k -> b g n q k"
            name = f"layers.{index}.blocks.{number}.attn"
            own = rearrange(weights[attention], pattern, g=rows * columns, n=attention.heads)
            within.append(place(name, weights=own, overlap=0))
        if isinstance(stage, MOAStage):
            moa: MOABlock = stage.moa
            overlap = int(moa.kv.padding[0])
            between.append(place(f"layers.{index}.moa", weights=weights[moa], overlap=overlap))
        elif isinstance(stage, PublishedStage):
            found = weights[stage.glb_attn]
            overlap = stage.glb_attn.overlap
            between.append(place(f"layers.{index}.glb_attn", weights=found, overlap=overlap, is_spatial=False))
    return between, within


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Record the weights (G, N, L, L) of every attention layer of this package during forward passes, on the CPU."""
    weights: dict[nn.Module, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, BiasedAttention)]

    def record(layer: nn.Module, own: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        eye_LL = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device)
        weights[layer] = attend(q, k, eye_LL.expand(*k.shape[:2], -1, -1).contiguous(), bias).cpu()
        return own(q, k, v, bias)

    for layer in layers:
        layer.attend = partial(record, layer, layer.attend)  # type: ignore[method-assign] # hides the method
    try:
        yield weights
    finally:
        for layer in layers:
            del layer.attend  # the method of the class is visible again
