"""Checks of the settings on a command line, before Hydra composes anything."""

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moa_train.cli import sweep
from moa_train.cli.compose import ARGS_KEY, GROUPS, OPTIONAL, config_roots, options_of
from moa_train.knobs import in_words, knobs
from moa_train.runtime.errors import UserError, check_all, choose


def check_overrides(arguments: list[str], schema: type) -> None:
    """Check ``key=value`` arguments before Hydra composes anything.

    Raises:
        UserError: keys, options or groups are unknown (the message suggests the nearest names), or values have the
            wrong type.
    """
    stray = [text for text in arguments if "=" not in text and not text.startswith(("-", "~"))]
    if stray and not any(text.startswith("-") for text in arguments):
        raise UserError(f"Unexpected argument {stray[0]!r}: arguments have the form key=value. See --help.")
    items = {key: item for key, item, _ in knobs(schema())}
    roots = config_roots(arguments)
    check_all(
        partial(_check_argument, text, schema, items, sweep.requested(arguments), roots)
        for text in arguments
        if not text.startswith("-") and ("=" in text or text.startswith("~"))
    )


def _check_argument(text: str, schema: type, items: Mapping[str, Any], in_sweep: bool, roots: Sequence[Path]) -> None:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise UserError(
            f"Cannot parse {text}. Write key=value without spaces around the equals sign, and close all brackets "
            "and quotes. A value with special characters, such as =, needs two pairs of quotes, one of them for "
            "the shell: \"run_dir='a=b'\"."
        ) from None
    _check_override(override, schema, items, in_sweep, roots)


def _check_override(
    override: Override, schema: type, items: Mapping[str, Any], in_sweep: bool, roots: Sequence[Path]
) -> None:
    key, text = override.key_or_group, override.input_line or ""
    if key.startswith(("hydra.run.", "hydra.sweep.")) and "sweep.dir" in items:
        raise UserError(f"{text} has no effect. Set run_dir for the folder of a run, or sweep.dir for that of a sweep.")
    if key.startswith("hydra"):
        return
    if override.is_delete():
        raise UserError(f"{text}: settings cannot be removed. Leave a setting out to use its default.")
    if ARGS_KEY.match(f"{key}=") and key.split(".args.")[0] + ".args" in items:
        return  # checked by the part that declares this setting
    known = key in GROUPS or key in items
    if not known and key in {head for name in items for head in _sections(name)}:
        return  # a whole section, as in model.moa={overlap:1,reduction:16}
    if not known:
        raise UserError(f"Unknown key {key}.{similar(key, list(items))}")
    if override.is_add():
        raise UserError(f"{text}: {key} exists already and cannot be added. Write {text.lstrip('+')}.")
    values = [override.value()]
    if override.is_sweep_override():
        if not in_sweep:
            raise UserError(
                f"{text} gives several values. To start one run for each, add -m. To pass a list, write [1,2]. To pass "
                f"text that contains commas, write \"{key}='a,b'\"."
            )
        # Unwrap quoted text. Hydra checks lists in sweeps, intervals and ranges itself.
        values = [getattr(value, "text", value) for value in getattr(override.value(), "list", [])]
    for value in values:
        if key in GROUPS:
            _check_option(key, value, roots)
        elif not isinstance(value, list) or len(values) == 1:
            _check_type(key, value, schema, items[key].type)


def _sections(key: str) -> list[str]:
    """Return the sections that contain a key: model and model.moa for model.moa.form."""
    parts = key.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def similar(key: str, keys: list[str]) -> str:
    """Return a hint for an unknown key: the nearest key, keys with a similar last part, or the keys of its section."""
    leaves: dict[str, list[str]] = {}
    for known in keys:
        leaves.setdefault(known.rpartition(".")[2], []).append(known)
    head, _, leaf = key.rpartition(".")
    if leaf in ELSEWHERE and ELSEWHERE[leaf] in keys:
        unit = f"='10 {leaf[4:] if '_' in leaf else leaf}'" if ELSEWHERE[leaf] == "schedule.duration" else ""
        return f" Did you mean {ELSEWHERE[leaf]}{unit}? --help lists every key."
    if close := difflib.get_close_matches(key, [*keys, *([] if head else GROUPS)], n=1, cutoff=0.8):
        return f" Did you mean {close[0]}? --help lists every key."
    if close := difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6):
        return f" Did you mean {' or '.join(leaves[close[0]])}? --help lists every key."
    inside = [known for known in keys if known.startswith(head + ".")] if head else []
    return f" Keys of {head}: {', '.join(known[len(head) + 1 :] for known in inside)}." if inside else " See --help."


def _check_type(key: str, value: Any, schema: type, kind: Any) -> None:
    try:
        OmegaConf.update(OmegaConf.structured(schema), key, value)
    except OmegaConfBaseException:
        shown = "null" if value is None else value
        raise UserError(f"{key}={shown} has the wrong type: it must be {in_words(kind)}.") from None


ELSEWHERE = {
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs", "steps", "max_steps"), "schedule.duration"),
    "learning_rate": "optim.lr",
}
"""What other trainers call some settings."""


def _check_option(group: str, option: Any, roots: Sequence[Path]) -> None:
    options = options_of(group, roots)
    if option is None and group in OPTIONAL:
        return
    if str(option) not in options:
        raise UserError(choose(group, "null" if option is None else option, options))
