"""Optimizers with one interface, whether they consist of one torch optimizer or several."""

from typing import Any

import torch
from torch.optim import Optimizer

from moa_train.interfaces import Classifier
from moa_train.optim.eager import eager
from moa_train.optim.groups import ParameterGroup, parameter_groups, split_matrices
from moa_train.optim.muon import BatchedMuon
from moa_train.plugins import OPTIMIZERS
from moa_train.runtime.errors import UserError
from moa_train.schema import OptimConfig


class Optimizers:
    """One or several torch optimizers (``parts``) over disjoint parameters, used as one.

    Checkpoints hold the state of the ``parts``. A ``GradScaler`` gets this object (``scaler.step(optimizers)``), so
    that one infinite gradient skips all parts.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[ParameterGroup]:
        """All parts' groups, in order."""
        return [group for part in self.parts for group in part.param_groups]

    def set_lr(self, lr: float) -> None:
        """Set every group's learning rate to ``lr`` times the group's ``lr_scale``."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def step(self) -> None:
        """Update the parameters from their gradients."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.zero_grad()


def create_optimizer(config: OptimConfig, model: Classifier, lr: float) -> Optimizers:
    """Create the configured optimizer for the trainable parameters of the bare ``model``, on its final device.

    Args:
        config: name and hyperparameters.
        model: not wrapped by DDP or compile.
        lr: peak learning rate, scaled to the batch size.

    Raises:
        UserError: the model has no trainable parameters, or none that the optimizer can train.
    """
    groups = parameter_groups(model, config)
    if not groups:
        raise UserError("The model has no trainable parameters: all of them are frozen.")
    made = OPTIMIZERS.create(config.name, config.args, "optim.args", config, model, groups, lr)
    optimizers = made if isinstance(made, list) else [made]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group.setdefault("lr_scale", 1.0)
    return Optimizers(optimizers)


@eager
class AdamW(torch.optim.AdamW):
    """torch's AdamW."""


@eager
class NAdam(torch.optim.NAdam):
    """torch's NAdam."""


@eager
class SGD(torch.optim.SGD):
    """torch's SGD."""


# An optimizer is a function of the configuration, the bare model, its parameter groups and the learning rate that
# returns one torch optimizer, or several over disjoint parameters. Your own has the same form.


def adamw(config: OptimConfig, model: Classifier, groups: list[ParameterGroup], lr: float) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019)."""
    return AdamW(groups, lr=lr, betas=_betas(config), eps=config.eps, **_fused(groups))


def nadamw(config: OptimConfig, model: Classifier, groups: list[ParameterGroup], lr: float) -> Optimizer:
    """Return AdamW with Nesterov momentum."""
    return NAdam(groups, lr=lr, betas=_betas(config), eps=config.eps, decoupled_weight_decay=True, foreach=True)


def sgd(config: OptimConfig, model: Classifier, groups: list[ParameterGroup], lr: float) -> Optimizer:
    """Return SGD with Nesterov momentum, where weight decay is part of the gradient."""
    momentum = config.momentum
    return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, **_fused(groups))


def muon(config: OptimConfig, model: Classifier, groups: list[ParameterGroup], lr: float) -> list[Optimizer]:
    """Return Muon (Jordan 2024) for the hidden matrices, and AdamW for all other parameters.

    Muon's steps have the size of AdamW's (Liu et al. 2025), so learning rates and weight decay carry over.
    """
    matrices, rest = split_matrices(model, groups)
    if not matrices:
        raise UserError("optim.name=muon needs hidden matrices, and this model has none. Use optim.name=adamw.")
    return [
        BatchedMuon(matrices, lr=lr, momentum=config.momentum),
        *([adamw(config, model, rest, lr)] if rest else []),
    ]


def _betas(config: OptimConfig) -> tuple[float, float]:
    return config.betas[0], config.betas[1]


def _fused(groups: list[ParameterGroup]) -> dict[str, Any]:
    """Return the argument for the fastest implementation: one kernel for all parameters where torch has it."""
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    return {"fused": True} if devices <= {"cpu", "cuda"} else {"foreach": True}
