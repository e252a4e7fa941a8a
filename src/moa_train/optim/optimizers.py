"""Optimizers by name, behind one small surface, whether they are one torch optimizer or two."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moa_train.optim.groups import ParameterGroup, parameter_groups, split_matrices
from moa_train.optim.muon import BatchedMuon
from moa_train.runtime.errors import UserError, choose

NAMES = ("adamw", "nadamw", "sgd", "muon")


class Optimizers:
    """One or several torch optimizers (``parts``) over disjoint parameters, used as one.

    ``names`` maps each parameter to its name in the model. Checkpoints work on ``parts``; a ``GradScaler`` takes the
    whole (``scaler.unscale_(optimizers)``, ``scaler.step(optimizers)``), so that an infinite gradient skips all parts.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.names: dict[Tensor, str] = {
            parameter: name
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    @property
    def param_groups(self) -> list[ParameterGroup]:
        """All parts' groups, in order."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters that are optimized, in order."""
        return list(self.names)

    def set_rate(self, rate: float) -> None:
        """Set every group's learning rate to ``rate`` times the group's ``rate_scale``."""
        for group in self.param_groups:
            group["lr"] = rate * group["rate_scale"]

    def step(self) -> None:
        """Update the parameters from their gradients."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    fused: bool | Literal["auto"] = "auto",
) -> Optimizers:
    """Create the optimizer ``name`` for the trainable parameters of the bare ``model``, on its final device.

    ``adamw``: Loshchilov and Hutter 2019. ``nadamw``: the same with Nesterov momentum. ``sgd``: Nesterov momentum,
    decay as part of the gradient. ``muon``: orthogonalised momentum (Jordan 2024) for the matrices of the
    body, with steps of the size that AdamW's have (Liu et al. 2025), so that its rate and decay carry over;
    AdamW for all others.

    ``betas`` and ``eps`` belong to the Adams, ``momentum`` to sgd and muon. ``fused`` updates all parameters
    in one kernel where torch has one (AdamW and SGD on the CPU and on CUDA).
    """
    _check(name, lr, weight_decay, betas, eps, momentum)
    groups = parameter_groups(model, weight_decay)
    fast = _fused(groups, fused)
    if name == "sgd":
        return Optimizers([torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, **fast)])
    adam: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    if name == "nadamw":
        return Optimizers([torch.optim.NAdam(groups, **adam, decoupled_weight_decay=True, foreach=True)])
    if name == "adamw":
        return Optimizers([torch.optim.AdamW(groups, **adam, **fast)])
    matrices, rest = split_matrices(model, groups)
    if not matrices:
        raise UserError("optim.name=muon needs matrices and this model has none in its body. Try optim.name=adamw.")
    muon = BatchedMuon(matrices, lr=lr, momentum=momentum)
    return Optimizers([muon, *([torch.optim.AdamW(rest, **adam, **fast)] if rest else [])])


def _fused(groups: list[ParameterGroup], fused: bool | Literal["auto"]) -> dict[str, Any]:
    """Return the keyword argument for the fastest implementation."""
    if not groups:
        raise UserError("The model has no trainable parameter: all of them are frozen.")
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    use_fused = devices <= {"cpu", "cuda"} if fused == "auto" else fused
    return {"fused": True} if use_fused else {"foreach": True}


def _check(name: str, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, momentum: float) -> None:
    if name not in NAMES:
        raise UserError(choose("optim.name", name, NAMES))
    for what, value, low, high in (
        ("lr", lr, 0.0, math.inf),
        ("weight_decay", weight_decay, 0.0, math.inf),
        ("betas[0]", betas[0], 0.0, 1.0),
        ("betas[1]", betas[1], 0.0, 1.0),
        ("momentum", momentum, 0.0, 1.0),
    ):
        if not low <= value < high:
            raise UserError(f"optim.{what}={value} must be at least {low:g} and below {high:g}.")
    if not 0 < eps < math.inf:
        raise UserError(f"optim.eps={eps} must be above 0.")
