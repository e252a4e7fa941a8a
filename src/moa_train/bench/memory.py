"""Measure the peak memory of a step, including its model and inputs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from moa_train.model.summary import PeakMemory


def allocated(device: torch.device) -> int:
    """Return the bytes of all tensors on a GPU, or 0 for a CPU, where PyTorch does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(step: Callable[[], object], device: torch.device, *, alive: object, before: int) -> int:
    """Run ``step`` once more and return its peak tensor memory in bytes.

    On CUDA, the result is the allocator's peak minus ``before``, the memory allocated before the model was built. On a
    CPU, tensors are counted as they are created and freed, starting with those in ``alive`` (nested lists and
    dictionaries of weights, optimizer state and inputs).
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
