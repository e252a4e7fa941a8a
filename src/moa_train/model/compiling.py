"""torch.compile, for a whole model or block by block."""

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from moa_train.model.layers import LocalBlock, PatchEmbedding, PatchMerging
from moa_train.model.moa import MOABlock

BLOCKS: tuple[type[nn.Module], ...] = (LocalBlock, MOABlock, PatchMerging, PatchEmbedding)


def compile_model(model: nn.Module, mode: str, **options: Any) -> nn.Module:
    """Return what to call in training in place of ``model``, compiled.

    Args:
        model: its parameters and their names stay as they are.
        mode: ``model`` compiles everything as one graph. ``blocks`` compiles one graph for each kind and shape of
            block: all blocks of a stage share it, so compiling takes a fraction of the time. A model without such
            blocks is compiled as a whole.
        options: of ``torch.compile``, such as ``backend``.
    """
    options = {"dynamic": False, **options}
    if mode == "model" or not has_blocks(model):
        return cast(nn.Module, torch.compile(model, **options))
    for kind in BLOCKS:
        forward = in_training(kind.forward, torch.compile(kind.forward, **options))
        for module in model.modules():
            if type(module) is kind:
                module.forward = MethodType(forward, module)
    return model


def has_blocks(model: nn.Module) -> bool:
    """Return whether a model has blocks that can be compiled one by one."""
    return any(type(module) in BLOCKS for module in model.modules())


def in_training(plain: Callable[..., Tensor], compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a method that is ``compiled`` in training mode and ``plain`` in evaluation."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return (compiled if module.training else plain)(module, x)

    return forward


def compiles(device: torch.device) -> bool:
    """Return whether torch.compile works here. It needs Triton, a C compiler and Python's headers."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception:
        return False
    return True
