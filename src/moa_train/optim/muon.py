"""Muon: orthogonalized momentum (Jordan 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982)."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moa_train.optim.eager import eager

Coefficients = tuple[float, float, float]


@eager
class BatchedMuon(torch.optim.Muon):
    """torch's Muon with the same state and results, but it orthogonalizes all matrices of one shape at once.

    A Transformer has many matrices of few shapes; torch processes them one by one, in several times as many kernels.
    The momentum is Nesterov's, and steps are as large as AdamW's (``match_rms_adamw``): 0.2 sqrt(max(rows, columns))
    U V^T. Like torch's fused optimizers, it skips the step on the device if the caller has set ``found_inf`` to 1.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler checks this
    found_inf: Tensor | None = None
    dtype = torch.bfloat16
    """Format of the orthogonalization."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "the training step calls backward itself"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return None

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        made: Tensor | float = 1.0  # 0 if the step is skipped; the momentum then moves toward itself
        if self.found_inf is not None:
            made, skipped = 1 - self.found_inf, self.found_inf.bool()
            gradients = [torch.where(skipped, m, g) for m, g in zip(momenta, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(parameters, 1 - made * (group["lr"] * group["weight_decay"]))
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            by_shape[parameter.shape].append(index)
        for shape, indices in by_shape.items():
            update_NAB = orthogonalize(
                torch.stack([ahead[i] for i in indices]),
                group["ns_coefficients"],
                group["ns_steps"],
                group["eps"],
                self.dtype,
            )
            step = group["lr"] * 0.2 * max(shape) ** 0.5
            same = [parameters[i] for i in indices]
            torch._foreach_add_(same, list((made * update_NAB.to(same[0].dtype)).unbind()), alpha=-step)


def orthogonalize(
    x_NAB: Tensor, coefficients: Coefficients, iterations: int, eps: float, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return approximately U V^T for each matrix U S V^T of a stack, by quintic Newton-Schulz iterations in ``dtype``.

    Each iteration maps every singular value s of the normalized matrix to a s + b s^3 + c s^5.
    """
    a, b, c = coefficients
    is_tall = x_NAB.shape[1] > x_NAB.shape[2]
    x_NAB = x_NAB.mT.to(dtype) if is_tall else x_NAB.to(dtype)
    x_NAB = x_NAB / x_NAB.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(iterations):
        gram_NAA = x_NAB @ x_NAB.mT
        gram_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, gram_NAA, x_NAB, beta=a)
    return x_NAB.mT if is_tall else x_NAB
