"""Plain hand-written steps, in which models are compared, and which are the baseline for the trainer's own loop."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa_train.optim.optimizers import Optimizers
from moa_train.runtime.precision import Precision


def update(
    model: nn.Module,
    optimizer: Optimizers,
    inputs: Iterable[tuple[Tensor, Tensor]],
    *,
    passes: int,
    precision: Precision,
    clip: Callable[[Sequence[Tensor]], object],
) -> None:
    """Perform one optimizer update from ``passes`` pairs of images (B, C, H, W) and target distributions (B, K)."""
    scaler = precision.scaler
    for images, targets in inputs:
        with precision.autocast():
            logits = model(images)
        scaler.scale(F.cross_entropy(logits.float(), targets) / passes).backward()
    whole: Any = optimizer
    scaler.unscale_(whole)
    clip(list(model.parameters()))
    scaler.step(whole)
    scaler.update()
    optimizer.zero_grad()


def optimize(model: nn.Module, optimizer: Optimizers) -> None:
    """Perform the optimizer's part of an update, with gradients equal to the weights."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach()
    optimizer.step()
    optimizer.zero_grad()


def predict(model: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """Return the logits (B, K) of a model in eval mode."""
    with torch.inference_mode(), precision.autocast():
        logits: Tensor = model(images)
    return logits
