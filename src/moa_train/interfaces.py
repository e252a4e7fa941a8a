"""What the training engine requires of models, batches and metrics. Your own models extend `Classifier`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Base class of models, whose methods describe the model to the other packages.

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
        return {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}

    def hidden_matrices(self) -> set[str]:
        """Return the parameters that Muon updates: all matrices except those of the head, tables and embeddings."""
        exempt, heads = self.no_weight_decay(), tuple(f"{head}." for head in self.head_names)
        return {
            name
            for name, parameter in self.named_parameters()
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

        return {name: layer(name) for name, _ in self.named_parameters()}

    def part_of(self, name: str) -> tuple[int, str]:
        """Return the stage (-1 if outside all stages) and the kind of part to which a parameter or module belongs.

        ``moa-model summary`` prints one row for each pair. The empty name is that of the model itself.
        """
        return -1, name.split(".")[0]


@dataclass(frozen=True)
class Batch:
    """Images of one size, their labels, and the identity of their samples.

    ``index``, ``epoch`` and ``repeat`` always stay on the host: augmentation derives its decisions from them, and
    decisions on the device would make the host wait for it.

    Attributes:
        images: uint8, (B, C, H, W).
        labels: int64, (B,).
        index: int64, (B,); position of each sample in the data set.
        epoch: int64, (B,); epoch of each sample.
        repeat: int64, (B,); number of the sample's repetition within its epoch (``augment.repeats``).
        step: optimizer step; in evaluation, the number of the chunk.
        micro: number of the micro-batch within the global batch; 0 in evaluation.
        unreadable: messages about files that could not be read and were replaced.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    epoch: Tensor
    repeat: Tensor
    step: int
    micro: int = 0
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with images and labels on ``device``."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """Return the batch with images and labels in page-locked memory, from which copies run asynchronously."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


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
