"""An optimizer's state as named tensors and JSON, to be stored without pickles and independently of parameter order."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moa_train.engine.weights import CheckpointError

Named = Iterable[tuple[str, nn.Parameter]]


def pack_optimizers(optimizers: Sequence[Optimizer], named: Named) -> tuple[dict[str, Tensor], list[Any]]:
    """Return (tensors keyed ``exp_avg|layers.0.weight``, JSON) of all optimizers of a model.

    ``named`` is ``model.named_parameters()``. The JSON has an entry per optimizer: its class, its groups with their
    hyperparameters and the names of their parameters, and which state each parameter has. Tensors are not copied.
    """
    names = {id(parameter): name for name, parameter in named}
    tensors: dict[str, Tensor] = {}
    packed = []
    for number, optimizer in enumerate(optimizers):
        groups, keys, values = [], {}, {}
        for index, group in enumerate(optimizer.param_groups):
            entry: dict[str, Any] = {"params": [names[id(parameter)] for parameter in group["params"]]}
            for key, value in group.items():
                if isinstance(value, Tensor):
                    tensors[f"{key}|optimizer{number}.group{index}"] = value
                elif key != "params":
                    entry[key] = value
            groups.append(entry)
        for parameter, state in optimizer.state.items():
            name = names[id(parameter)]
            keys[name] = sorted(key for key, value in state.items() if isinstance(value, Tensor))
            tensors |= {f"{key}|{name}": state[key] for key in keys[name]}
            if others := {key: value for key, value in state.items() if not isinstance(value, Tensor)}:
                values[name] = others
        packed.append({"class": type(optimizer).__name__, "groups": groups, "tensors": keys, "values": values})
    return tensors, packed


def unpack_optimizers(
    optimizers: Sequence[Optimizer],
    named: Named,
    tensors: Mapping[str, Tensor],
    packed: Sequence[Mapping[str, Any]],
    keep: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """Put what `pack_optimizers` returned into freshly made optimizers, in place.

    Hyperparameters become those of the checkpoint, but for those named in ``keep``, where what the optimizer has now stays.
    Returns all that differ, {"groups[0].weight_decay": (checkpoint's, now)}. State that is missing or left over, other
    groups or another class of optimizer are a CheckpointError that lists them; nothing has been changed then.
    """
    names = {id(parameter): name for name, parameter in named}
    problems: list[str] = []
    if len(optimizers) != len(packed):
        problems.append(f"{len(packed)} optimizers in the checkpoint, {len(optimizers)} now")
    left = dict(tensors)
    loads: list[tuple[Optimizer, dict[str, Any]]] = []
    changes: dict[str, tuple[Any, Any]] = {}
    for number, (optimizer, saved) in enumerate(zip(optimizers, packed, strict=False)):
        if saved["class"] != type(optimizer).__name__:
            problems.append(f"{saved['class']} in the checkpoint, {type(optimizer).__name__} now")
            continue
        state = _state(optimizer, saved, names, left, problems)
        groups = _groups(optimizer, number, saved, names, left, problems)
        if groups is None:
            continue
        for index, (group, now) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
            where = f"groups[{index}]" if len(optimizers) == 1 else f"optimizers[{number}].groups[{index}]"
            for key in set(group) - {"params"}:
                if not _equal(group[key], now[key]):
                    changes[f"{where}.{key}"] = (group[key], now[key])
                    if key in keep:
                        group[key] = now[key]
        loads.append((optimizer, {"state": state, "param_groups": groups}))
    problems += [f"unexpected {key}" for key in left]
    if problems:
        listed = "\n  ".join(problems[:8] + [f"and {len(problems) - 8} more"] * (len(problems) > 8))
        raise CheckpointError(f"The optimizer's state in the checkpoint does not fit:\n  {listed}")
    for optimizer, state_dict in loads:
        optimizer.load_state_dict(state_dict)
    return changes


def _state(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    names: Mapping[int, str],
    left: dict[str, Tensor],
    problems: list[str],
) -> dict[int, dict[str, Any]]:
    """Collect {index of parameter: its state}, taking the tensors out of ``left``."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {names[id(parameter)]: index for index, parameter in enumerate(parameters)}
    for name, keys in saved["tensors"].items():
        if name not in index_of:
            problems.append(f"state of {name}, which this optimizer does not have")
            continue
        entry: dict[str, Any] = dict(saved["values"].get(name, {}))
        for key in keys:
            value = left.pop(f"{key}|{name}", None)
            if value is None:
                problems.append(f"missing {key}|{name}")
            else:
                entry[key] = _like(value, parameters[index_of[name]])
        state[index_of[name]] = entry
    return state


def _groups(
    optimizer: Optimizer,
    number: int,
    saved: Mapping[str, Any],
    names: Mapping[int, str],
    left: dict[str, Tensor],
    problems: list[str],
) -> list[dict[str, Any]] | None:
    """Collect the groups as load_state_dict wants them, or None where they are not the same parameters."""
    known = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if [group["params"] for group in saved["groups"]] != known:
        before = {name for group in saved["groups"] for name in group["params"]}
        now = {name for group in known for name in group}
        problems.append(
            f"{saved['class']}: parameters only in the checkpoint: {sorted(before - now)[:3]}, only now: "
            f"{sorted(now - before)[:3]}"
            if before != now
            else f"{saved['class']}: the parameters are in other groups or in another order"
        )
        return None
    groups = []
    start = 0
    for index, (entry, now_group) in enumerate(zip(saved["groups"], optimizer.param_groups, strict=True)):
        group = {key: tuple(value) if isinstance(now_group.get(key), tuple) else value for key, value in entry.items()}
        suffix = f"|optimizer{number}.group{index}"
        for key in [key for key in left if key.endswith(suffix)]:
            group[key.removesuffix(suffix)] = left.pop(key)
        group["params"] = list(range(start, start + len(entry["params"])))
        start += len(entry["params"])
        problems += [f"hyperparameter {key} of group {index} on one side only" for key in set(group) ^ set(now_group)]
        groups.append(group)
    return groups


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Give a state of the parameter's shape the parameter's strides too: fused kernels want them alike."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _equal(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor) or isinstance(now, Tensor):
        return float(before) == float(now)
    return bool(before == now)
