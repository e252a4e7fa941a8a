"""The training objective."""

import torch
from torch import Tensor


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Return the cross-entropy against target distributions, *summed* over the batch (nats, at least float32).

    The sum, not the mean: the caller divides by the size of the whole global batch, so that micro-batches and ranks of
    any size add up to the gradient of the one large batch.
    """
    dtype = torch.promote_types(logits_BK.dtype, torch.float32)
    return -(targets_BK.to(dtype) * logits_BK.to(dtype).log_softmax(dim=-1)).sum()
