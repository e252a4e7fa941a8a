"""Gradient norms and the relative sizes of updates, by layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moa_train.interfaces import Classifier


class UpdateRatios:
    """Measure gradients and updates of every layer.

    ``per_layer/gradient_LAYER`` is the norm of the gradient, and ``per_layer/update_LAYER`` the norm of the update
    divided by that of the weights.

    Layers that hardly learn, or learn much faster than the others, stand out. Measuring takes a copy of the parameters.
    The host does not wait for the device.

    Args:
        model: the bare model. If it declares no layers, its immediate submodules are measured.
        due: whether to measure the update with this number, counted from 1.
    """

    def __init__(self, model: Classifier, due: Callable[[int], bool]) -> None:
        self.due = due
        own, ids = model.layer_names(), model.layer_ids()
        layers = [*own, model.head_name] if own else []
        self.layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            layer = name.partition(".")[0]
            if name in ids:
                layer = layers[ids[name]] if layers else f"layer{ids[name]:02}"
            if parameter.requires_grad:
                self.layers.setdefault(layer, []).append(parameter)
        self._before: dict[str, list[Tensor]] = {}
        self.values: dict[str, Tensor] = {}

    def before(self, step: int) -> None:
        """Note gradients and parameters before update number ``step``, counted from 0, if they are to be measured."""
        self._before, self.values = {}, {}
        if self.due(step + 1):
            for layer, parameters in self.layers.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                self.values[f"per_layer/gradient_{layer}"] = _norm(gradients)
                self._before[layer] = [parameter.detach().clone() for parameter in parameters]

    def after(self) -> None:
        """Complete ``values``, which are empty if this update is not measured."""
        for layer, old in self._before.items():
            change = torch._foreach_sub([parameter.detach() for parameter in self.layers[layer]], old)
            self.values[f"per_layer/update_{layer}"] = _norm(list(change)) / _norm(old).clamp_min(1e-12)
        self._before = {}


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)
