"""Loading weights into a model, also at another resolution or window size. Any mismatch is an error."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_train.model.timm_door import TimmModel
from moa_train.runtime.errors import UserError

SHOWN = 20  # mismatches listed in an error


@dataclass
class Loaded:
    """Changes that `load_weights` made; both lists are empty if it copied all weights as they were."""

    resized: list[str] = field(default_factory=list)  # "name: (27, 27, 3) -> (15, 15, 3)"
    new: list[str] = field(default_factory=list)  # parameters of the classifier that kept their initial values

    def __str__(self) -> str:
        """Return the changes in words."""
        more = f" (and {len(self.resized) - 1} more)" if len(self.resized) > 1 else ""
        parts = [f"resized {self.resized[0]}{more}"] if self.resized else []
        if head := [name for name in self.new if not name.endswith("num_batches_tracked")]:
            parts.append(f"new classifier ({', '.join(head)})")
        return "; ".join(parts) or "all tensors as they are"


def load_weights(
    model: Any, weights: Mapping[str, Tensor], *, head: str = "strict", grid: tuple[int, int] | None = None
) -> Loaded:
    """Copy ``weights``, a state dict of the same architecture, into a model of `create_model`.

    At another resolution or window size, position tables and the kernels of the paper's MOA block, which cover a
    window, are interpolated. Everything else must match.

    Args:
        model: the model, changed in place.
        weights: tensors by name.
        head: "strict" loads the classifier as well; "new" keeps the model's newly initialized one.
        grid: rows and columns of a ViT's position table in ``weights``, if they are known; otherwise, tables of equal
            size are copied, and others are taken for square.

    Raises:
        UserError: entries are missing, unexpected or different. The model is then unchanged.
    """
    own, heads = model.state_dict(), tuple(f"{name}." for name in model.head_names)
    fresh = {name for name in own if head == "new" and name.startswith(heads)}
    # Older weights of torchvision lack the counters, which only matter to batch normalization without momentum.
    fresh |= {name for name in own if name.endswith("num_batches_tracked") and name not in weights}
    given = {name: value for name, value in weights.items() if name not in fresh}
    result = Loaded(new=sorted(fresh))
    problems = [f"unexpected: {name} {_size(value)}" for name, value in given.items() if name not in own]
    problems += [f"missing: {name} {_size(value)}" for name, value in own.items() if name not in {*given, *fresh}]
    fitted: dict[str, Tensor] = {}
    for name in (name for name in own if name in given):
        fitted[name] = fit(name, given, own, (grid, getattr(model, "grid", None)))
        if fitted[name].shape != own[name].shape:
            problems.append(f"different: {name} {_size(given[name])}, the model has {_size(own[name])}")
        elif name.endswith("relative_position_index") and not torch.equal(fitted[name], own[name]):
            problems.append(f"different: {name} numbers the positions in another order")
        elif fitted[name].shape != given[name].shape:
            result.resized.append(f"{name}: {_size(given[name])} -> {_size(own[name])}")
    if problems:
        raise UserError(_mismatch(problems, model, head))
    model.load_state_dict(fitted, strict=False)
    return result


Grids = tuple[tuple[int, int] | None, tuple[int, int] | None]


def fit(name: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor], grids: Grids = (None, None)) -> Tensor:
    """Return ``given[name]``, interpolated to the shape of ``own[name]`` if it is a position table or a MOA kernel.

    Args:
        name: of the tensor.
        given: all given tensors.
        own: all tensors of the model.
        grids: rows and columns of the given and of the model's own table of absolute positions, if they are known.
    """
    value, wanted = given[name], own[name]
    turned = name.endswith("pos_embedding") and None not in grids and grids[0] != grids[1]
    if (value.shape == wanted.shape and not turned) or value.dim() != wanted.dim():
        return value
    if name.endswith("relative_position_index"):
        return wanted  # it depends only on the geometry
    same_channels = value.shape[-1] == wanted.shape[-1]
    if name.endswith("relative_position_bias_table") and same_channels:
        index = name.replace("bias_table", "index")
        return resize_offsets(value, offsets(value, given.get(index)), wanted.shape, offsets(wanted, own.get(index)))
    if name.endswith("pos_embedding") and same_channels:
        return resize_positions(value, wanted.shape[1], grids)
    if name.endswith(("moa.q.weight", "moa.kv.weight")) and value.shape[:2] == wanted.shape[:2]:
        return resize_kernel(value, wanted.shape[-1])
    return value


def offsets(table: Tensor, index: Tensor | None) -> tuple[int, int]:
    """Return the numbers of vertical and horizontal offsets, 2h - 1 and 2w - 1, that a position table covers."""
    if table.dim() == 3:  # (2h - 1, 2w - 1, N)
        return table.shape[0], table.shape[1]
    rows = table.shape[0]  # (2h - 1) (2w - 1): either h = w, or the index (L, L) determines them
    if index is None or index.dim() != 2 or math.isqrt(len(index)) ** 2 == len(index):
        return math.isqrt(rows), math.isqrt(rows)
    # Along the first row of the grid, the offset decreases by one per position. The row ends where this stops.
    falls = (index[0, 0] - index[0]).tolist()
    width = sum(fall == position for position, fall in enumerate(falls))
    return rows // (2 * width - 1), 2 * width - 1


def resize_offsets(table: Tensor, old: tuple[int, int], shape: torch.Size, new: tuple[int, int]) -> Tensor:
    """Interpolate a table of relative positions; offset 0 stays at the center, the largest offsets at the borders."""
    if math.prod(old) * table.shape[-1] != table.numel():
        return table
    grid_1NRR = table.view(*old, -1).permute(2, 0, 1)[None]
    for axis, (length, wanted) in enumerate(zip(old, new, strict=True), start=2):
        if wanted == 1:  # offset 0, where align_corners would take the border
            grid_1NRR = grid_1NRR.narrow(axis, length // 2, 1)
    resized_1NRR = F.interpolate(grid_1NRR.double(), size=new, mode="bicubic", align_corners=True)
    return resized_1NRR[0].permute(1, 2, 0).reshape(shape).to(table.dtype)


def resize_positions(table_1LC: Tensor, length: int, grids: Grids = (None, None)) -> Tensor:
    """Interpolate the absolute positions of a ViT; the class token's comes first and is kept."""
    sides = math.isqrt(table_1LC.shape[1] - 1), math.isqrt(length - 1)
    old, new = (grid or (side, side) for grid, side in zip(grids, sides, strict=True))
    if math.prod(old) + 1 != table_1LC.shape[1] or math.prod(new) + 1 != length:
        return table_1LC
    grid_1CHW = table_1LC[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    resized_1CHW = F.interpolate(grid_1CHW, size=new, mode="bicubic", align_corners=False)
    return torch.cat([table_1LC[:, :1], resized_1CHW.flatten(2).transpose(1, 2)], dim=1)


def resize_kernel(weight_OIKK: Tensor, size: int) -> Tensor:
    """Resample the kernel of a patch projection, so that an equally resampled map yields nearly the same tokens."""
    old = weight_OIKK.shape[-1]
    resized_OIKK = F.interpolate(weight_OIKK, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized_OIKK * (old / size) ** 2


def _size(value: Tensor) -> str:
    return f"({', '.join(map(str, value.shape))})"


def _mismatch(problems: list[str], model: Any, head: str) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
    more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    hint = ""
    if head == "strict" and any(f" {name}." in problem for problem in problems for name in model.head_names):
        hint = "\nThe classifier differs. init_head=new reinitializes it."
    if isinstance(model, TimmModel) and any(problem.startswith("different: ") for problem in problems):
        hint += (
            "\nIf only the image size differs, timm can resize the weights: run moa-export format=hub on them, and "
            "give model.args.pretrained=FOLDER/model.safetensors instead of init=."
        )
    return f"The weights do not match the model in {len(problems)} entries:{lines}{more}{hint}"
