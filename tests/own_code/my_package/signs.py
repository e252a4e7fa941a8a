"""An optimizer: sign descent with momentum. Its state is tensors, so checkpoints hold it without extra code."""

import torch
from torch import nn

from moa_train.schema import OptimConfig


def sign_descent(config: OptimConfig, model: nn.Module, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """Take the parameter groups (with and without weight decay), and return one torch optimizer or a list of them."""
    return SignDescent(groups, {"lr": lr, "momentum": config.momentum})


class SignDescent(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(state["momentum_buffer"].sign(), alpha=group["lr"])
