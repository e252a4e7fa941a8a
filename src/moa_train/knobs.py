"""Declare and check settings: the fields of configuration dataclasses."""

import math
import operator
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any

from moa_train.runtime.errors import UserError, nearest


def knob(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    options: tuple[str, ...] | None = None,
    plugins: Any = None,
    fixed: bool = False,
    form: str = "",
) -> Any:
    """Declare a field of a configuration dataclass.

    Args:
        default: value if the user does not set it.
        text: help in one line: what the setting does, its unit, and the meaning of the default.
        least, most: inclusive bounds, which apply to every entry of a list.
        above, below: exclusive bounds.
        options: the allowed values.
        plugins: a `plugins.Plugins` if the value names a part, either by its name in the table or by import path.
        fixed: whether the value cannot change when a run is resumed.
        form: what a text means: "path", or "duration", such as 300 epochs or 5%.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    rule = {"help": text, **bounds, "options": options, "plugins": plugins, "fixed": fixed, "form": form}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=rule)
    return field(default=default, metadata=rule)


def knobs(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(dotted key, field, value)`` for every setting of a configuration object and its sections."""
    for item in fields(config):
        key = prefix + item.name
        value = getattr(config, item.name, None)
        if is_dataclass(value):
            yield from knobs(value, key + ".")
        else:
            yield key, item, value


def fill(kind: type, values: Mapping[str, Any], key: str) -> Any:
    """Return an instance of the dataclass ``kind`` with the given values, after checking them.

    Args:
        kind: a dataclass whose fields may be knobs.
        values: values by field name, as read from YAML or JSON.
        key: prefix of the field names in error messages, such as ``model.args``.

    Raises:
        UserError: a name is unknown, or a value is of the wrong type, out of range or missing.
    """
    known = {item.name: item for item in fields(kind)}
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"Unknown key {key}.{name}.{nearest(name, known)} Keys of {key}: {', '.join(known)}.")
        if not fits(value, hints[name]):
            raise UserError(f"{key}.{name}={value!r} has the wrong type: it must be {in_words(hints[name])}.")
        check_entries(f"{key}.{name}", value, known[name].metadata)
    missing = [
        f"{key}.{item.name}"
        for item in known.values()
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise UserError(f"Missing {', '.join(missing)}: there is no default, so give a value.")
    return kind(**{name: _as(value, hints[name]) for name, value in values.items()})


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value from YAML or JSON has the annotated type; an integer is also a float."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin in (list, tuple):
        inner = parts[0] if parts else Any
        return isinstance(value, list | tuple) and all(fits(entry, inner) for entry in value)
    if origin is dict or kind is dict:
        return isinstance(value, Mapping)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _as(value: Any, kind: Any) -> Any:
    return float(value) if kind is float else tuple(value) if typing.get_origin(kind) is tuple else value


_NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def in_words(kind: Any) -> str:
    """Describe an annotated type for an error message."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (list, tuple):
        return f"a list, [x,y,...], where each entry is {in_words(parts[0])}"
    if origin is dict:
        return "a mapping, {key:value,...}"
    return " or ".join(_NOUNS.get(part) or in_words(part) for part in parts) if parts else _NOUNS.get(kind, str(kind))


def check_entries(key: str, value: Any, rule: Mapping[str, Any]) -> None:
    """Check a value, or every entry of a list, against the options and the range of its knob.

    Raises:
        UserError: the message gives the key, the value and the allowed values.
    """
    for entry in value if isinstance(value, list | tuple) else [value]:
        _check_entry(key, entry, rule)


def _check_entry(key: str, value: Any, rule: Mapping[str, Any]) -> None:
    if value is None:
        return
    if rule.get("plugins") is not None:
        rule["plugins"].check(key, value)
    options = rule.get("options")
    if options and value not in options:
        raise UserError(f"{key}={value} is not known.{nearest(value, options)} Options: {', '.join(options)}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    bounds = [(sign, rule[name]) for name, sign in _SIGNS.items() if rule.get(name) is not None]
    if not math.isfinite(value) or not all(_HOLDS[sign](value, bound) for sign, bound in bounds):
        rules = [f"{sign} {bound}" for sign, bound in bounds] or ["finite"]
        raise UserError(f"{key}={value} is out of range: it must be {' and '.join(rules)}.")


_SIGNS = {"least": ">=", "above": ">", "most": "<=", "below": "<"}
_HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
