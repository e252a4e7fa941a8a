"""Gradient clipping and the gradient norm, without waiting for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from moa_train.schema import OptimConfig


def clip_gradients(parameters: Iterable[Tensor], config: OptimConfig) -> Tensor:
    """Clip the gradients in place and return their total norm before clipping, a scalar on their device.

    ``clip=norm`` scales all gradients together so that their norm is at most ``clip_value``; ``clip=value`` clamps
    each entry to [-clip_value, clip_value]; ``clip=none`` changes nothing. A norm of NaN or infinity is returned.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        return torch.zeros(())
    total_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if config.clip == "norm":
        clip_grads_with_norm_(parameters, config.clip_value, total_norm)
    elif config.clip == "value":
        clip_grad_value_(parameters, config.clip_value)
    return total_norm
