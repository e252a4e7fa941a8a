"""The interfaces that the training engine requires of models, batches and metrics. Your own parts implement them."""

from collections.abc import Iterator
from typing import Protocol, Self

import torch
from torch import Tensor, nn


class Classifier:
    """Mixin for models, ``class Mine(Classifier, nn.Module)``, whose methods describe the model to the other packages.

    A model maps normalized images (B, 3, H, W) to logits (B, num_classes). All names are those from
    ``named_parameters()`` or ``named_modules()``. The defaults fit models whose last layer is called ``head`` and
    whose parameters need no special treatment.

    Attributes:
        head_name: name of the last linear layer, which ``init_head=new`` reinitializes.
    """

    head_name = "head"

    @property
    def head_names(self) -> list[str]:
        """Names of all classifiers; a distilled model may have two."""
        return [self.head_name]

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the feature map (B, C, H, W) of every stage, for use as a backbone."""
        raise NotImplementedError(f"{type(self).__name__} has no feature maps")

    def load_pretrained(self) -> None:
        """Load the weights that the model's own settings name, if any. Only a new run without ``init`` calls this."""

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of two or more dimensions that are exempt from weight decay. 1-D ones always are."""
        return {
            f"{name}.weight"
            for name, module in self.described_module.named_modules()
            if isinstance(module, nn.Embedding)
        }

    def hidden_matrices(self) -> set[str]:
        """Return the parameters that Muon updates: all matrices except those of the head, tables and embeddings."""
        exempt, heads = self.no_weight_decay(), tuple(f"{head}." for head in self.head_names)
        return {
            name
            for name, parameter in self.described_module.named_parameters()
            if parameter.ndim == 2 and name not in exempt and not name.startswith(heads)
        }

    def layer_names(self) -> list[str]:
        """Return prefixes of parameter names, one per layer, from the input to the head.

        Layer-wise lr decay (``optim.layer_decay``) counts these layers. A parameter belongs to the layer with the
        longest matching prefix. Parameters without a match belong to the first layer, and the head comes last.
        """
        return []

    def layer_ids(self) -> dict[str, int]:
        """Return the layer number of every parameter, counted from 0, or nothing if the model declares no layers."""
        layers = self.layer_names()
        if not layers:
            return {}
        ids = {prefix: number for number, prefix in enumerate(layers)} | {self.head_name: len(layers)}

        def layer(name: str) -> int:
            matches = [prefix for prefix in ids if name == prefix or name.startswith(f"{prefix}.")]
            return ids[max(matches, key=len)] if matches else 0

        return {name: layer(name) for name, _ in self.described_module.named_parameters()}

    def part_of(self, name: str) -> tuple[int, str]:
        """Return the stage (-1 if outside all stages) and the kind of part to which a parameter or module belongs.

        ``moa-model summary`` prints one row for each pair. The empty name is that of the model itself.
        """
        return -1, name.split(".")[0]

    @property
    def described_module(self) -> nn.Module:
        """Return the module that the methods above describe, by default this object."""
        assert isinstance(self, nn.Module)
        return self


class Batch(Protocol):
    """A micro-batch: images, labels and the identity of every sample.

    ``index``, ``epoch`` and ``repeat`` stay on the host, so that decisions based on them need not wait for the device.
    """

    def __len__(self) -> int:
        """Return the number of samples."""

    @property
    def images(self) -> Tensor:
        """Images before augmentation and normalization, uint8, (B, 3, H, W)."""

    @property
    def labels(self) -> Tensor:
        """Class indices, int64, (B,)."""

    @property
    def index(self) -> Tensor:
        """Positions of the samples in the data set, int64, (B,)."""

    @property
    def epoch(self) -> Tensor:
        """Epoch of each sample, int64, (B,)."""

    @property
    def repeat(self) -> Tensor:
        """Number of earlier occurrences of each sample in the same epoch, int64, (B,)."""

    @property
    def step(self) -> int:
        """Optimizer step to which the micro-batch belongs."""

    @property
    def micro(self) -> int:
        """Position of the micro-batch within the global batch."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the micro-batch with images and labels on ``device``."""


class Batches(Protocol):
    """The batches of one evaluation on one rank."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield each batch once."""


class Metric(Protocol):
    """A number that an evaluation computes from *sums* over all samples.

    The sums over batches and ranks are exact and independent of the order if ``count`` returns int64. With float64,
    they are so up to rounding.

    Attributes:
        higher_is_better: whether the best checkpoint is the one with the highest value.
    """

    higher_is_better: bool

    def count(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        """Return the contribution of a batch to the sums: a tensor on the same device, of one shape for all batches.

        Args:
            logits_BK: float32, (B, K).
            labels_B: int64, (B,).
        """

    def value(self, totals: Tensor, samples: int) -> float:
        """Return the metric.

        Args:
            totals: sums over all batches of all ranks, on the CPU.
            samples: number of samples.
        """
