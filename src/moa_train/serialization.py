"""Configurations as dictionaries, as files of runs hold them, and back, also from earlier versions."""

import os
import re
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_type_hints

from moa_train.runtime.errors import UserError, nearest
from moa_train.schema import RunConfig


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, lists and scalars (JSON), as records contain it."""
    record: dict[str, Any] = _recorded(asdict(config))
    return record


class FromEnvironment(str):
    """Text that a setting takes from environment variables. Records contain the ``expression`` instead."""

    def __new__(cls, value: str, expression: str = "") -> "FromEnvironment":
        """Keep the expression next to the text."""
        self = super().__new__(cls, value)
        self.expression = expression
        return self

    expression: str


ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,\s*([^${}]*))?\}")
"""Matches a reference to an environment variable, with or without a default."""
SECRET = re.compile("secret|token|pass|key|credential|auth|private", re.IGNORECASE)
"""Matches names of variables that probably hold secrets, which no setting needs."""


def _recorded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _recorded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_recorded(part) for part in value]
    return value.expression if isinstance(value, FromEnvironment) else value


def _from_record(value: Any) -> Any:
    """Replace references to environment variables by their values, except those of secrets and of unset variables."""
    if isinstance(value, dict):
        return {key: _from_record(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_from_record(part) for part in value]

    def read(found: re.Match[str]) -> str:
        given = None if SECRET.search(found[1]) else os.environ.get(found[1], found[2])
        return found[0] if given is None else given

    text = ENVIRONMENT.sub(read, value) if isinstance(value, str) else value
    return value if text == value else FromEnvironment(text, value)


def from_dict(values: dict[str, Any], kind: type = RunConfig, prefix: str = "") -> Any:
    """Return the configuration that `to_dict` of this or an earlier version converted to a dictionary.

    Raises:
        UserError: this version does not know a key. Missing keys take their defaults.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{prefix[:-1] or 'The configuration'} must be a mapping of keys to values, not {values!r:.80}."
        )
    if not prefix:
        values = _updated(values)
    known = {item.name: item for item in fields(kind)}
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"Unknown configuration key {prefix}{key}.{nearest(key, known)}")
        nested = is_dataclass(hints[key]) and isinstance(hints[key], type)
        arguments[key] = from_dict(value, hints[key], f"{prefix}{key}.") if nested else _from_record(value)
    return kind(**arguments)


RENAMED = {
    ("augment", "off"): "weak_for",
    ("engine", "rollback_rate"): "rollback_lr_factor",
    ("tracking", "tensorboard"): "loggers",
}
"""Current names of renamed keys of version 0.1, by (section, key)."""


def _updated(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of version 0.1, as a dictionary, with the current keys and values."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for (section, old), new in RENAMED.items():
        part = values.get(section)
        if isinstance(part, dict) and old in part:
            value = part.pop(old)
            part[new] = (["tensorboard"] if value else []) if old == "tensorboard" else value
    moa = values["model"].get("moa") if isinstance(values.get("model"), dict) else None
    if isinstance(moa, dict) and moa.get("form") == "released":
        values["model"]["moa"] = {**moa, "form": "published"}
    return values
