"""The training loss. Your own loss is a function of the same form."""

import torch
from torch import Tensor


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Return the cross-entropy against target distributions, *summed* over the batch (nats, at least float32).

    The caller divides the sum by the size of the global batch, so that the gradients of micro-batches and ranks add up
    to the gradient of the whole batch.
    """
    dtype = torch.promote_types(logits_BK.dtype, torch.float32)
    return -(targets_BK.to(dtype) * logits_BK.to(dtype).log_softmax(dim=-1)).sum()
