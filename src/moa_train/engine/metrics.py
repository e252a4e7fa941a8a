"""Metrics of an evaluation, as exact sums over all samples; see `interfaces.Metric`."""

import torch
from torch import Tensor

from moa_train.interfaces import Metric
from moa_train.plugins import METRICS, short_name
from moa_train.runtime.device import has_float64
from moa_train.schema import EngineConfig

NO_RANK = torch.iinfo(torch.int64).max
"""Rank of the label of a sample without probabilities, so that it is not a hit in any top-k."""


def create_metrics(config: EngineConfig) -> dict[str, Metric]:
    """Return the configured metrics by name."""
    return {
        name: METRICS.create(path, config.args.get(name, {}), f"engine.args.{name}")
        for name, path in ((short_name(path), path) for path in config.metrics)
    }


class Top1:
    """Percentage of samples whose label has the largest logit."""

    higher_is_better = True

    def count(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        """Return the number of hits in a batch, int64."""
        return (rank_of_label(logits_BK, labels_B) < 1).sum()

    def value(self, totals: Tensor, samples: int) -> float:
        """Return the percentage."""
        return 100 * int(totals) / max(samples, 1)


class Top5(Top1):
    """Percentage of samples whose label is among the five largest logits."""

    def count(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        """Return the number of hits in a batch, int64."""
        return (rank_of_label(logits_BK, labels_B) < 5).sum()


class Loss:
    """Mean cross-entropy in nats."""

    higher_is_better = False

    def count(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        """Return the sum over a batch, float64."""
        total = torch.nn.functional.cross_entropy(logits_BK, labels_B, reduction="sum")
        return (total if has_float64(total.device) else total.cpu()).double()

    def value(self, totals: Tensor, samples: int) -> float:
        """Return the mean."""
        return float(totals) / max(samples, 1)


def rank_of_label(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return how many classes are ranked before each sample's label: 0 is a top-1 hit. Shape (B,), int64.

    Ties go to the lower class index on every device. A sample without probabilities has `NO_RANK`.
    """
    label_B1 = labels_B[:, None]
    logit_B1 = logits_BK.gather(1, label_B1)
    classes_K = torch.arange(logits_BK.shape[1], device=logits_BK.device)
    ahead_BK = (logits_BK > logit_B1) | ((logits_BK == logit_B1) & (classes_K < label_B1))
    return torch.where(has_probabilities(logits_BK), ahead_BK.sum(dim=1), NO_RANK)


def has_probabilities(logits_BK: Tensor) -> Tensor:
    """Return whether the softmax of each sample's logits is defined: (B,), bool.

    It is not if a logit is NaN or infinity, or if all are minus infinity. Minus infinity is the logit of a class with a
    probability of 0.
    """
    return logits_BK.amax(dim=1).isfinite()  # the maximum of numbers and NaN is NaN
