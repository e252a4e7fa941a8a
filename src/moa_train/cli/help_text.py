"""The text of --help: groups with their options, and settings with their defaults."""

import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from moa_train.cli.compose import GROUPS, compose, config_roots, is_override, options_of
from moa_train.knobs import knobs
from moa_train.plugins import args_type
from moa_train.schema import parts

OPTIONS = """Options:
  -m, --multirun                              run all combinations of comma-separated values, one after the other
  --config-dir DIR                            folder with your own recipes (DIR/GROUP/OPTION.yaml) and modules
  --cfg job                                   print the composed configuration and exit
  --version                                   print the version and exit
"""
GROUPS_HELP = "Groups (GROUP=OPTION), each a folder of conf/:\n\n"
WIDTH, INDENT = 120, 46
"""Columns of the help, and the one where descriptions start."""


def own_settings(arguments: Sequence[str], config_name: str) -> list[tuple[str, Any, str]]:
    """Return key, default and help of the settings that belong to parts named on the command line."""
    overrides = [text for text in arguments if is_override(text)]
    if not overrides:
        return []
    composed = compose(config_name, overrides, config_roots(arguments))
    described = []
    for kind, name, _, key in parts(OmegaConf.to_object(composed)):
        settings = args_type(kind.load(name)) if kind.may_have_args(name) else None
        for item in fields(settings) if settings else ():
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            shown = "REQUIRED" if default is MISSING else default
            described.append((f"{key}.{item.name}", shown, item.metadata.get("help", "")))
    return described


def help_text(
    schema: type, examples: str, own: Sequence[tuple[str, Any, str]], roots: Sequence[Path], sweeps: bool
) -> str:
    """Return the help.

    Args:
        schema: dataclass of the configuration.
        examples: title and example commands.
        own: see `own_settings`.
        roots: see `config_roots`.
        sweeps: whether the command starts several runs with -m.
    """
    lines: list[str] = []
    section = ""
    for key, item, value in knobs(schema()):
        head = key.rpartition(".")[0]
        if head != section:
            lines.append("")
            section = head
        rule = item.metadata
        names = (*rule["plugins"].table, "package.module:name") if rule["plugins"] else rule["options"]
        lines += _entry(key, value, rule["help"] + (f" [{', '.join(names)}]" if names else ""))
    if own:
        lines.append("")
    for key, value, text in own:
        lines += _entry(key, value, text)
    grouped = any(item.name in GROUPS for item in fields(schema))
    usage = (
        f"usage: {examples.partition(':')[0]} {'[GROUP=OPTION ...] ' if grouped else ''}[KEY=VALUE ...] [OPTION ...]"
    )
    settings = "Settings (KEY=VALUE) with their defaults" + (
        ". Groups change some defaults; --cfg job shows the result.\n" if grouped else ":\n"
    )
    groups = "".join(f"{group}: {', '.join(options_of(group, roots))}\n" for group in sorted(GROUPS))
    options = "".join(line for line in OPTIONS.splitlines(True) if sweeps or "--multirun" not in line)
    blocks = [usage, f"{examples}\n", options, *([f"{GROUPS_HELP}{groups}\n"] if grouped else [])]
    return "\n".join([*blocks, settings + "\n".join(lines)])


def _entry(key: str, value: Any, text: str) -> list[str]:
    """Return the lines of the help that describe a setting."""
    first = f"  {key}={_shown(value)}".ljust(INDENT - 1) + " "
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * INDENT, break_on_hyphens=False)
    return lines or [first.rstrip()]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
