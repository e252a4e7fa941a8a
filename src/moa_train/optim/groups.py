"""Which parameters decay: matrices and kernels do; biases, norms, scales, tokens and position tables don't."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Matched against a parameter's own name (the last part of the dotted one): relative_position_bias_table,
# pos_embedding, absolute_pos_embed, class_token, in_proj_bias, logit_scale, layer_scale, ...
_TABLE = re.compile(r"(^|_)(pos|position|positional|bias|token|scale)(_|$)")
_HEADS = ("head", "heads", "fc", "classifier")
_EMBEDDING = re.compile(r"embed|stem")

ParameterGroup = dict[str, Any]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Split the trainable parameters of the bare ``model`` (not wrapped by DDP or compile) by decay.

    Each group is ready for any ``torch.optim`` optimizer, which keeps the names as ``param_names``:
    ``{"name": "decay" | "no_decay", "params": [(name, tensor), ...], "weight_decay": float, "rate_scale": 1.0}``.
    Shared parameters appear once, under their first name.
    """
    tables = _tables(model)
    decay: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, parameter in _trainable(model):
        (rest if parameter.ndim <= 1 or name in tables else decay).append((name, parameter))
    groups = [_group("decay", decay, weight_decay), _group("no_decay", rest, 0.0)]
    _assert_partition(model, groups)
    return [group for group in groups if group["params"]]


def split_matrices(model: nn.Module, groups: list[ParameterGroup]) -> tuple[list[ParameterGroup], list[ParameterGroup]]:
    """Cut groups in two: the body's matrices (2-D; no head, embedding or table), and everything else."""
    tables = _tables(model)

    def is_matrix(name: str, parameter: Tensor) -> bool:
        outside = name.split(".")[0] in _HEADS or _EMBEDDING.search(name) is not None
        return parameter.ndim == 2 and name not in tables and not outside

    matrices = [{**group, "params": [p for p in group["params"] if is_matrix(*p)]} for group in groups]
    rest = [{**group, "params": [p for p in group["params"] if not is_matrix(*p)]} for group in groups]
    return [group for group in matrices if group["params"]], [group for group in rest if group["params"]]


def _group(name: str, params: list[tuple[str, Tensor]], weight_decay: float) -> ParameterGroup:
    return {"name": name, "params": params, "weight_decay": weight_decay, "rate_scale": 1.0}


def _trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _tables(model: nn.Module) -> set[str]:
    """Return the names of biases, scales, tokens, position tables and embeddings of any number of dimensions."""
    named = {name for name, _ in model.named_parameters() if _TABLE.search(name.rsplit(".", 1)[-1])}
    return named | {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _assert_partition(model: nn.Module, groups: list[ParameterGroup]) -> None:
    grouped = [name for group in groups for name, _ in group["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == {name for name, _ in _trainable(model)}, "a parameter is in no group"
