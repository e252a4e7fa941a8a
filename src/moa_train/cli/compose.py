"""Compose configurations from command-line arguments, with Hydra."""

import argparse
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

import moa_train.conf
from moa_train.knobs import knobs
from moa_train.runtime.command_line import hydra_quoted, path
from moa_train.runtime.errors import UserError
from moa_train.serialization import ENVIRONMENT, SECRET, FromEnvironment
from moa_train.validation import validate

CONF = Path(moa_train.conf.__file__).parent
GROUPS = {folder.name: folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "__pycache__"}
"""The groups of the configuration: one folder per group, one YAML file per option."""


OPTIONAL = ("experiment", "debug")
"""Groups of which no option may be chosen."""


def is_override(argument: str) -> bool:
    """Return whether an argument has the form key=value."""
    return "=" in argument and not argument.startswith("-")


def addable(argument: str) -> str:
    """Return an argument in the form that Hydra accepts: keys below ``args`` are not in its schema and need ``++``.

    Hydra writes "no option of a group", null, as an empty list.
    """
    if argument in [f"{group}=null" for group in OPTIONAL]:
        return argument.replace("null", "[]")
    return f"++{argument}" if ARGS_KEY.match(argument) else argument


def readable(argument: str, texts: Collection[str] = ()) -> str:
    """Return an argument in a form that Hydra's grammar reads, where ~ and characters beyond ASCII need quotes.

    Args:
        argument: an argument of the command line.
        texts: keys of settings that are texts. Hydra would rewrite a text that looks like a number, such as 1e3.
    """
    key, separator, value = argument.partition("=")
    if argument.startswith("--"):
        return f"{key}{separator}{path(value)}" if value.startswith("~") else argument  # --config-dir=~/recipes
    if value.startswith("~") and "," not in value:
        return f"{key}={hydra_quoted(value)}"
    if not separator or argument.startswith("-") or re.search(r"""['"{}()]""", value):
        return argument
    if key in texts and re.fullmatch(r"[+-]?\d[\d_]*(\.\d*)?([eE][+-]?\d+)?", value):
        return f"{key}={hydra_quoted(value)}"

    def quoted(found: re.Match[str]) -> str:
        text = found[0].strip()
        return found[0] if text.isascii() and not text.startswith("~") else hydra_quoted(text)

    return f"{key}=" + re.sub(r"[^,\[\]]+", quoted, value)


ARGS_KEY = re.compile(r"\w+\.args\.[\w.]+=")
"""Matches keys of settings that a part declares itself."""


def compose(config_name: str, overrides: Sequence[str], roots: Sequence[Path]) -> DictConfig:
    """Return the configuration composed from overrides, without running a command.

    Args:
        config_name: primary YAML file below ``conf/``; its schema must be in Hydra's store.
        overrides: ``key=value`` arguments.
        roots: folders from `config_roots`.
    """
    folders = [f"file://{root.resolve()}" for root in roots[1:]]
    search = [f"hydra.searchpath={folders}"] if folders else []
    with hydra.initialize_config_module("moa_train.conf", version_base="1.3"):
        return hydra.compose(config_name, [*map(addable, overrides), *search])


def config_roots(arguments: Sequence[str]) -> list[Path]:
    """Return the folders that hold the options: conf/, then the user's own folder given by ``--config-dir``."""
    folder = hydra_options(arguments).config_dir
    return [CONF, folder] if folder else [CONF]


def options_of(group: str, roots: Sequence[Path]) -> list[str]:
    """Return the options of a group: the names of the files in its folders."""
    return sorted({path.stem for root in roots for path in (root / group).glob("*.yaml")})


def hydra_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return those of Hydra's options that the commands themselves act on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=path)
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--config-name", "-cn")  # otherwise, this and the next one would be read as -c
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    return parser.parse_known_args(arguments)[0]


def typed(config: DictConfig) -> Any:
    """Return the composed configuration as a validated dataclass."""
    _refuse_secrets(config)
    result: Any = OmegaConf.to_object(config)
    _keep_expressions(result, OmegaConf.to_container(config, resolve=False))
    expand_home(result)
    validate(result)
    return result


def expand_home(config: Any) -> None:
    """Expand ~ in the paths of a command's configuration, where the shell did not."""
    for key, item, value in list(knobs(config)):
        if value and item.metadata["form"] == "path":
            section, _, name = key.rpartition(".")
            holder = getattr(config, section) if section else config
            setattr(holder, name, [_expanded(text) for text in value] if isinstance(value, list) else _expanded(value))


def _expanded(text: str) -> str:
    expanded = os.path.expanduser(text)  # noqa: PTH111 a Path would change what was typed
    return FromEnvironment(expanded, text.expression) if isinstance(text, FromEnvironment) else expanded


def _keep_expressions(holder: Any, expressions: Any) -> None:
    """Replace texts that were taken from environment variables, so that records contain the expressions instead."""
    for key, expression in expressions.items():
        values = holder if isinstance(holder, dict) else vars(holder)
        if isinstance(expression, dict):
            _keep_expressions(values[key], expression)
        elif isinstance(expression, str) and isinstance(values[key], str) and ENVIRONMENT.search(expression):
            values[key] = FromEnvironment(values[key], expression)


def _refuse_secrets(config: DictConfig) -> None:
    """Raise `UserError` if a setting uses an environment variable whose name suggests a secret.

    No setting needs a secret, because libraries read secrets from the environment themselves.
    """
    text = str(OmegaConf.to_container(config, resolve=False))
    for name in re.findall(r"\boc\.env:\s*\W*(\w+)", text):
        if SECRET.search(name):
            raise UserError(
                f"${{oc.env:{name}}} looks like a secret. The values of settings may be printed and logged, and "
                f"no setting needs a secret. Remove it, or, if {name} is not a secret, let the "
                f"shell insert it: ${name}."
            )
