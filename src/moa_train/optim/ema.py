"""EMA weights: the exponential moving average of the parameters over the updates."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moa_train.runtime.errors import UserError


class AveragedWeights:
    """Exponential moving average of the parameters of the bare ``model`` (not wrapped by DDP or compile).

    After update ``t``, counted from 0: average += (1 - d) (parameter - average), where d = min(decay, (1 + t) /
    (10 + t)), so that the untrained weights soon lose their influence. The averages start at the parameters' values
    and are stored once, in at least fp32. Buffers are the model's current ones. Every rank computes its own averages,
    which are equal because the parameters are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.updates = 0
        self._parameters = list(model.parameters())
        self._averages = [p.detach().to(_at_least_fp32(p), copy=True) for p in self._parameters]

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Move the averages toward the parameters; to be called once after each optimizer step.

        ``skipped`` is 1 on the device if the optimizers skipped that step. The averages then stay the same.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach().to(_at_least_fp32(p)) for p in self._parameters]
        if skipped is None:
            torch._foreach_lerp_(self._averages, current, 1 - decay)
        else:
            change = torch._foreach_sub(current, self._averages)
            torch._foreach_mul_(change, (1 - decay) * (1 - skipped))
            torch._foreach_add_(self._averages, change)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the ``with`` block with the averages in place of the model's parameters.

        Values are copied in place, so wrappers of the model (DDP, compile) see them. The parameters' own values are
        kept in a second copy and restored exactly, also after an exception.
        """
        own = [p.detach().clone() for p in self._parameters]
        try:
            self._copy_to_model(self._averages)
            yield
        finally:
            self._copy_to_model(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict with the averages in place of the parameters: live tensors, not copies.

        The caller saves ``updates`` along with it.
        """
        average_of = dict(zip(self._parameters, self._averages, strict=True))
        state = self.model.state_dict(keep_vars=True)
        return {name: average_of.get(tensor, tensor).detach() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore what `state_dict` returned, except for the buffers, which belong to the model."""
        named = dict(zip((name for name, _ in self.model.named_parameters()), self._averages, strict=True))
        missing = [name for name in named if name not in state]
        unknown = sorted(set(state) - set(self.model.state_dict()))
        other = [name for name in named if name in state and state[name].shape != named[name].shape]
        if missing or unknown or other:
            raise UserError(
                f"The EMA weights do not fit the model: missing {missing}, unknown {unknown}, other shape {other}. "
                "Start a new run from the weights with init=."
            )
        for name, average in named.items():
            average.copy_(state[name])
        self.updates = updates

    @torch.no_grad()
    def _copy_to_model(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
