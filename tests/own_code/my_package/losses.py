"""A loss: focal loss (arXiv 1708.02002) for target distributions."""

from dataclasses import dataclass

from torch import Tensor

from moa_train.knobs import knob


@dataclass
class FocalArgs:
    gamma: float = knob(2.0, "how strongly well-classified examples are discounted; 0 is cross-entropy", least=0)


def focal(logits_BK: Tensor, targets_BK: Tensor, args: FocalArgs) -> Tensor:
    """Return the *sum* of the loss over the batch; the trainer divides by the size of the global batch."""
    log_p_BK = logits_BK.float().log_softmax(dim=1)
    return -(targets_BK * (1 - log_p_BK.exp()) ** args.gamma * log_p_BK).sum()
