"""torch.compile, for an entire model or block by block."""

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from moa_train.model.layers import ConvMerging, ConvStem, LocalBlock, PatchEmbedding, PatchMerging
from moa_train.model.moa import MOABlock

BLOCKS: tuple[type[nn.Module], ...] = (LocalBlock, MOABlock, PatchMerging, ConvMerging, PatchEmbedding, ConvStem)


def compile_model(model: nn.Module, mode: str, purpose: str = "default", **options: Any) -> nn.Module:
    """Return the compiled module to call in training in place of ``model``.

    Args:
        model: the model; its parameters and their names do not change.
        mode: ``model`` compiles everything as one graph. ``blocks`` compiles one graph per kind and shape of block,
            which all blocks of a stage share, so compiling takes a fraction of the time. A model without such blocks
            is compiled as one graph.
        purpose: the mode of ``torch.compile``: ``default``, ``reduce-overhead`` or ``max-autotune``. The latter two use
            CUDA graphs and require a call of ``torch.compiler.cudagraph_mark_step_begin`` before each update.
        options: other arguments of ``torch.compile``, such as ``backend``.
    """
    options = {"dynamic": False, **({} if purpose == "default" else {"mode": purpose}), **options}
    if mode == "model" or not has_blocks(model):
        return cast(nn.Module, torch.compile(model, **options))
    for kind in BLOCKS:
        forward = in_training(kind.forward, torch.compile(kind.forward, **options))
        for module in model.modules():
            if type(module) is kind:
                module.forward = MethodType(forward, module)
    return model


def has_blocks(model: nn.Module) -> bool:
    """Return whether a model has blocks that can be compiled individually."""
    return any(type(module) in BLOCKS for module in model.modules())


def in_training(plain: Callable[..., Tensor], compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a method that calls ``compiled`` in training mode and ``plain`` in evaluation mode."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return (compiled if module.training else plain)(module, x)

    return forward


def compiles(device: torch.device) -> bool:
    """Return whether torch.compile works on ``device``. It requires Triton, a C compiler and Python's headers."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception:
        return False
    return True
