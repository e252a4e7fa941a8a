"""Parameter groups: which parameters decay, which ones Muon updates, and the learning rate factor of each layer."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from moa_train.interfaces import Classifier
from moa_train.runtime.errors import UserError
from moa_train.schema import OptimConfig

ParameterGroup = dict[str, Any]


def parameter_groups(model: Classifier, config: OptimConfig) -> list[ParameterGroup]:
    """Split the trainable parameters of the bare ``model`` (not wrapped by DDP or compile) by decay and by layer.

    Each group is ready for any ``torch.optim`` optimizer, which keeps the names as ``param_names``:
    ``{"name": "decay" | "no_decay", "params": [(name, tensor), ...], "weight_decay": float, "lr_scale": float}``.
    Shared parameters appear once, under their first name.

    Raises:
        UserError: ``layer_decay`` is set, but the model doesn't declare its layers.
    """
    exempt = model.no_weight_decay()
    scales = _lr_scales(model, config.layer_decay)
    groups: list[ParameterGroup] = []
    for scale in dict.fromkeys(scales.values()):
        decay: list[tuple[str, Tensor]] = []
        rest: list[tuple[str, Tensor]] = []
        for name, parameter in _trainable(model):
            if scales[name] == scale:
                (rest if parameter.ndim <= 1 or name in exempt else decay).append((name, parameter))
        groups.append({"name": "decay", "params": decay, "weight_decay": config.weight_decay, "lr_scale": scale})
        groups.append({"name": "no_decay", "params": rest, "weight_decay": 0.0, "lr_scale": scale})
    return [group for group in groups if group["params"]]


def split_matrices(
    model: Classifier, groups: list[ParameterGroup]
) -> tuple[list[ParameterGroup], list[ParameterGroup]]:
    """Divide groups into the hidden matrices of the model and everything else."""
    hidden = model.hidden_matrices()
    matrices = [{**group, "params": [p for p in group["params"] if p[0] in hidden]} for group in groups]
    rest = [{**group, "params": [p for p in group["params"] if p[0] not in hidden]} for group in groups]
    return [group for group in matrices if group["params"]], [group for group in rest if group["params"]]


def _lr_scales(model: Classifier, layer_decay: float) -> dict[str, float]:
    """Return the learning rate factor of every parameter: 1 for the head, times ``layer_decay`` per layer below."""
    names = [name for name, _ in _trainable(model)]
    if layer_decay == 1:
        return dict.fromkeys(names, 1.0)
    ids = model.layer_ids()
    if not ids:
        raise UserError(
            f"optim.layer_decay={layer_decay} needs a model that declares its layers, and {type(model).__name__} does "
            "not. Implement Classifier.layer_names in it, or set optim.layer_decay=1."
        )
    return {name: layer_decay ** (max(ids.values()) - ids[name]) for name in names}


def _trainable(model: Classifier) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
