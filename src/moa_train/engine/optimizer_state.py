"""The state of optimizers as named tensors and JSON: without pickle, independent of the order of parameters."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moa_train.engine.tensorfile import CheckpointError
from moa_train.runtime.errors import UserError

Named = Iterable[tuple[str, nn.Parameter]]
"""``model.named_parameters()``"""


def pack_optimizers(optimizers: Sequence[Optimizer], named: Named) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the live state of a model's optimizers: tensors with keys like ``exp_avg|layers.0.weight``, and JSON.

    The JSON has one entry per optimizer: its class, its groups (hyperparameters and parameter names), the names of the
    state tensors of each parameter, so that `unpack_optimizers` notices a missing one, and the numbers of each.

    Raises:
        UserError: an optimizer keeps something else than tensors and numbers.
    """
    names = {id(parameter): name for name, parameter in named}
    tensors: dict[str, Tensor] = {}
    packed = []
    for optimizer in optimizers:
        groups = [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        state: dict[str, list[str]] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for parameter, values in optimizer.state.items():
            name = names[id(parameter)]
            present = {key: value for key, value in values.items() if value is not None}
            own = {key: value for key, value in present.items() if isinstance(value, Tensor)}
            numbers |= {name: {key: present[key] for key in present.keys() - own}} if present.keys() - own else {}
            if others := [key for key, value in numbers.get(name, {}).items() if not isinstance(value, int | float)]:
                raise UserError(
                    f"{type(optimizer).__name__} cannot be saved: {', '.join(others)} must be tensors or numbers in "
                    "its state."
                )
            state[name] = sorted(own)
            tensors |= {f"{key}|{name}": value for key, value in own.items()}
        packed.append({"class": type(optimizer).__name__, "groups": groups, "state": state, "numbers": numbers})
    return tensors, packed


@torch.no_grad()
def unpack_optimizers(
    optimizers: Sequence[Optimizer],
    named: Named,
    tensors: Mapping[str, Tensor],
    packed: Sequence[Mapping[str, Any]],
    keep: Collection[str] = (),
) -> None:
    """Restore what `pack_optimizers` returned into newly created optimizers, in place.

    Hyperparameters are restored as well, except for those named in ``keep``.

    Raises:
        CheckpointError: classes, groups or parameters differ, or state is missing or unexpected. The message lists the
            differences, and nothing was changed.
    """
    names = {id(parameter): name for name, parameter in named}
    problems: list[str] = []
    classes = [entry["class"] for entry in packed], [type(optimizer).__name__ for optimizer in optimizers]
    if classes[0] != classes[1]:
        problems.append(f"{' and '.join(classes[0])} in the checkpoint, {' and '.join(classes[1])} now")
    else:
        for optimizer, entry in zip(optimizers, packed, strict=True):
            problems += _group_problems(optimizer, entry, names)
    expected = [f"{key}|{name}" for entry in packed for name, keys in entry["state"].items() for key in keys]
    problems += [f"missing {label}" for label in expected if label not in tensors]
    problems += [f"unexpected {label}" for label in set(tensors) - set(expected)]
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        listed = "\n  ".join(problems[:8] + more)
        raise CheckpointError(f"The optimizer state in the checkpoint does not fit this run:\n  {listed}")
    for optimizer, entry in zip(optimizers, packed, strict=True):
        _load(optimizer, entry, names, tensors, keep)


def _group_problems(optimizer: Optimizer, entry: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    kind = entry["class"]
    now = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    before = [group["params"] for group in entry["groups"]]
    if now != before:
        gone = sorted({name for group in before for name in group} - {name for group in now for name in group})
        new = sorted({name for group in now for name in group} - {name for group in before for name in group})
        if not gone and not new:
            return [f"{kind}: the parameters are in different groups or in a different order"]
        return [f"{kind}: {name} is only in the checkpoint" for name in gone] + [
            f"{kind}: {name} is only in this run" for name in new
        ]
    return [
        f"{kind}: hyperparameter {key} of group {index} is only in {'this run' if key in group else 'the checkpoint'}"
        for index, (group, old) in enumerate(zip(optimizer.param_groups, entry["groups"], strict=True))
        for key in sorted(group.keys() ^ old.keys())
    ]


def _load(
    optimizer: Optimizer,
    entry: Mapping[str, Any],
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    keep: Collection[str],
) -> None:
    """Restore one optimizer, after all checks."""
    state_dict = optimizer.state_dict()
    for group, old in zip(state_dict["param_groups"], entry["groups"], strict=True):
        for key in old.keys() - {"params", *keep}:
            group[key] = tuple(old[key]) if isinstance(group[key], tuple) else old[key]  # JSON has no tuples
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored = {
        index: {key: tensors[f"{key}|{name}"] for key in entry["state"][name]}
        for index, parameter in enumerate(parameters)
        if (name := names[id(parameter)]) in entry["state"]
    }
    numbers = entry.get("numbers", {})  # older checkpoints have none
    full = {index: {**values, **numbers.get(names[id(parameters[index])], {})} for index, values in stored.items()}
    optimizer.load_state_dict({**state_dict, "state": full})
    for index, values in stored.items():
        state = optimizer.state[parameters[index]]
        for key, tensor in values.items():
            state[key] = _restored(tensor, state[key], parameters[index])


def _restored(tensor: Tensor, loaded: Tensor, parameter: Tensor) -> Tensor:
    """Copy ``tensor`` to the device of ``loaded``, in its own dtype, because torch casts to that of the parameter.

    A state tensor of the parameter's shape also gets its strides, because fused kernels need them to be equal.
    """
    like = parameter if tensor.shape == parameter.shape else tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=loaded.device).copy_(tensor)
