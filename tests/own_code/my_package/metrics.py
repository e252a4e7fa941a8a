"""A metric: the mean of the classes' accuracies, in percent."""

import torch
from torch import Tensor


class Balanced:
    higher_is_better = True

    def count(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        """Return what a batch adds to the sums: hits and samples of every class, (2, K), int64."""
        hits_B = logits_BK.argmax(dim=1) == labels_B
        classes = logits_BK.shape[1]
        return torch.stack([labels_B[hits_B].bincount(minlength=classes), labels_B.bincount(minlength=classes)])

    def value(self, totals: Tensor, samples: int) -> float:
        """Return the metric from the sums over all batches of all ranks."""
        hits_K, total_K = totals.double()
        return float(100 * (hits_K[total_K > 0] / total_K[total_K > 0]).mean())
