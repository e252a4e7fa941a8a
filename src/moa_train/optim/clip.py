"""Gradient clipping, and the gradient's norm, without waiting for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from moa_train.runtime.errors import UserError, choose

MODES = ("norm", "value", "none")


def check_clip(mode: str, limit: float) -> None:
    """Raise :class:`UserError` unless ``mode`` is known and ``limit`` fits it."""
    if mode not in MODES:
        raise UserError(choose("optim.clip", mode, MODES))
    if mode != "none" and not limit > 0:
        raise UserError(f"optim.clip_value={limit} must be above 0. To switch clipping off, write optim.clip=none.")


def clip_gradients(parameters: Iterable[Tensor], mode: str, limit: float) -> Tensor:
    """Clip the gradients in place and return their total norm from before, a scalar on their device.

    ``norm``: all gradients together are shortened to the length ``limit``; ``value``: each entry is cut to
    [-limit, limit]; ``none``: nothing is changed. A norm that is not finite is returned, not raised.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        return torch.zeros(())
    total_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if mode == "norm":
        clip_grads_with_norm_(parameters, limit, total_norm)
    elif mode == "value":
        clip_grad_value_(parameters, limit)
    return total_norm
