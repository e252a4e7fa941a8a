"""The settings of a ``moa-bench`` call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moa_train.schema import RunConfig


@dataclass(frozen=True)
class Job:
    """A configuration and how to measure it. Every value of a sequence is a case of its own.

    Attributes:
        config: model, data, optimizer, precision and so on, as in ``moa-train``.
        overrides: command-line arguments from which ``config`` was composed.
        compose: function that composes another configuration from such arguments.
        num_classes: number of classes of the configured data set.
        device: device chosen by ``config.runtime.device``.
        rounds: number of measurements per candidate.
        seconds: minimum duration of a measurement of a step, stage or save.
        steps: number of training steps per measurement of a complete training.
        modes: ``train``, ``infer`` or both.
        batches: images per forward pass; empty: the configured micro-batch size.
        precisions: values of ``runtime.precision``; empty: the configured precision.
        compiles: whether to use torch.compile.
        checkpointings: whether to recompute activations in the backward pass.
        against: peers. For input: ``timm`` and ``torchvision``. For step: ``timm/NAME``, ``torchvision/NAME`` and
            ``moa-train/OPTION``, with arguments after a colon.
        ranks: number of processes.
    """

    config: RunConfig
    overrides: Sequence[str]
    compose: Callable[[Sequence[str]], RunConfig]
    num_classes: int
    device: torch.device
    rounds: int = 7
    seconds: float = 0.5
    steps: int = 100
    modes: Sequence[str] = ("train", "infer")
    batches: Sequence[int] = ()
    precisions: Sequence[str] = ()
    compiles: Sequence[bool] = (False,)
    checkpointings: Sequence[bool] = (False,)
    against: Sequence[str] = ()
    ranks: int = 2
