"""The most memory that a step takes, with what it works on."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from moa_train.model.summary import PeakMemory


def allocated(device: torch.device) -> int:
    """Return the bytes of all tensors on a GPU; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(step: Callable[[], object], device: torch.device, *, alive: object, before: int) -> int:
    """Run ``step`` once more and return the most bytes of tensors that it needed at a time.

    On CUDA that is what the allocator says, less what was there ``before`` the model. On a CPU tensors are counted as
    they come and go, beginning with those in ``alive`` (nested lists and dictionaries of weights, states and inputs).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        for value in tree_iter(alive):
            if isinstance(value, Tensor):
                memory.note(value.untyped_storage())
        step()
    return memory.peak
