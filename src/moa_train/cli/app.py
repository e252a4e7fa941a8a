"""What the commands based on Hydra share: typed configuration, help and error messages."""

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from moa_train import __version__
from moa_train.cli import sweep
from moa_train.cli.compose import (
    ARGS_KEY,
    GROUPS,
    OPTIONAL,
    addable,
    compose,
    config_roots,
    is_override,
    options,
    readable,
    typed,
)
from moa_train.knobs import in_words, knobs
from moa_train.plugins import DATASETS, args_type
from moa_train.runtime.cpu import wait_briefly
from moa_train.runtime.errors import LostRankError, UserError, check_all, choose
from moa_train.runtime.output import protect_output
from moa_train.runtime.signals import Exit
from moa_train.schema import parts


def run(
    task: Callable[[Any, list[str]], int | None],
    schema: type,
    config_name: str,
    examples: str,
    multirun: Callable[[Sequence[str], str], int] | None = None,
    *,
    images: bool = True,
) -> NoReturn:
    """Compose a configuration from the command line, validate it and run ``task`` with it. This never returns.

    Args:
        task: called with the validated configuration and the overrides as the user typed them; returns the exit code.
        schema: dataclass of the configuration.
        config_name: primary YAML file below ``conf/``, whose defaults list names the schema.
        examples: title and example commands, shown at the top of ``--help``.
        multirun: runs a sweep (-m), given the arguments and ``config_name``, and returns the exit code.
        images: whether the command reads images. Otherwise, a data set whose classes are known needs no folder.
    """
    store = ConfigStore.instance()
    store.store(name=f"{config_name}_schema", node=schema)

    def checked(config: DictConfig) -> None:
        # This runs inside Hydra's task, so that Hydra still handles --help and --cfg.
        # Do not resolve the overrides, which would replace ${oc.env:NAME} with the value of the variable.
        overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        if not images and config.data.name in DATASETS.table and DATASETS.load(config.data.name).num_classes:
            config.data.root = config.data.root or "."
        if code := _guarded(lambda: task(typed(config), overrides), arguments, schema):
            sys.exit(code)

    protect_output()
    wait_briefly()
    texts = {key for key, item, _ in knobs(schema()) if item.type in (str, str | None)}
    arguments = sys.argv[1:] = [readable(text, texts) for text in sys.argv[1:]]
    # Users keep modules next to their recipes or in the current folder. They come last, to never shadow a library.
    sys.path += [str(root.resolve()) for root in config_roots(arguments)[1:]] + [str(Path.cwd())]
    if "--version" in arguments:
        print(f"moa-train {__version__}")
        sys.exit(Exit.FINISHED)
    if (options(arguments).cfg or {"--help", "-h"} & set(arguments)) and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback if `head` or a pager exits early
    if not options(arguments).info:  # Hydra has its own handler for these messages
        logging.basicConfig(format="%(message)s")
    logging.getLogger("moa_train").setLevel(logging.INFO)  # not the root logger, because libraries log a lot
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes exceptions through, and _guarded handles them

    def execute() -> int | None:
        for root in config_roots(arguments):
            if not root.is_dir():
                raise UserError(f"--config-dir {root}: there is no such folder.")
        if {"--help", "-h"} & set(arguments):
            # Hydra would compose every option of every group for its help, which takes a second.
            own = _own_settings(arguments, config_name)
            print(_help(schema, examples, own, config_roots(arguments), sweeps=multirun is not None))
            return None
        if not {"--hydra-help", "--shell-completion", "-sc"} & set(arguments):
            check_overrides(arguments, schema)
            if sweep.requested(arguments):
                if multirun is None:
                    raise UserError(
                        "-m is an option of moa-train, which starts several runs. Run this command once for each."
                    )
                if options(arguments).cfg:
                    raise UserError("-m cannot be combined with --cfg, because a sweep has many configurations.")
                return multirun(arguments, config_name)
        vars(hydra_utils)["argparse"] = SimpleNamespace(ArgumentParser=_Parser)
        # Options come first, because argparse accepts positional arguments only on one side of them.
        sys.argv[1:] = sorted(map(addable, arguments), key=lambda text: "=" in text and not text.startswith("-"))
        hydra.main(version_base="1.3", config_path="pkg://moa_train.conf", config_name=config_name)(checked)()
        return None

    sys.exit(_guarded(execute, arguments, schema))


class _Parser(argparse.ArgumentParser):
    """Hydra's parser of options, without abbreviations: --multi would pass the checks that look for --multirun.

    The help of one of Hydra's options is an object, but Python 3.14 and newer require a text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def add_argument(self, *names: str, help: object = "", **options: Any) -> argparse.Action:
        """Add an option."""
        return super().add_argument(*names, help=str(help), **options)


def _own_settings(arguments: Sequence[str], config_name: str) -> list[tuple[str, Any, str]]:
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
    if key.startswith(("hydra.run", "hydra.sweep")):
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
        raise UserError(f"Unknown key {key}.{_similar(key, list(items))}")
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


def _similar(key: str, keys: list[str]) -> str:
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


def _options(group: str, roots: Sequence[Path]) -> list[str]:
    """Return the options of a group: the names of the files in its folders."""
    return sorted({path.stem for root in roots for path in (root / group).glob("*.yaml")})


def _check_option(group: str, option: Any, roots: Sequence[Path]) -> None:
    options = _options(group, roots)
    if option is None and group in OPTIONAL:
        return
    if str(option) not in options:
        raise UserError(choose(group, "null" if option is None else option, options))


def _guarded(action: Callable[[], int | None], arguments: Sequence[str] = (), schema: type | None = None) -> int:
    """Run ``action`` and return the exit code; print errors that users can fix without a traceback.

    Args:
        action: returns the exit code.
        arguments: of the command line.
        schema: dataclass of the configuration, if there is one.
    """
    try:
        return action() or Exit.FINISHED
    except UserError as error:
        _explain(f"error: {error}")
    except LostRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.FAILED
    except (HydraException, OmegaConfBaseException) as error:
        lines = str(error).split("\n\n")[0].splitlines()  # the rest explains Hydra rather than the error
        lines = [line for line in lines if not line.startswith(" ")]
        if "Key 'False'" in str(error):
            lines.append(
                "YAML reads the keys off and no as false. The setting augment.off is now called augment.weak_for."
            )
        if schema and (found := re.search(r"Key '\w+' not in '\w+'\n\s+full_key: (\S+)", str(error))):
            lines.append(_explain_key(found[1], schema))
        _explain("\n".join(["error: " + lines[0], *lines[1:]]))
    except YAMLError as error:
        _explain(f"error: A recipe is not valid YAML: {error}")
    except UnicodeDecodeError as error:
        files = [path for root in config_roots(arguments)[1:] for path in root.rglob("*.yaml") if not _is_utf8(path)]
        if not files:
            raise
        _explain(f"error: {files[0]} is not encoded in UTF-8 ({error}). Save it as UTF-8.")
    except KeyboardInterrupt:  # during a training, StopSignals handles this instead
        return Exit.INTERRUPTED
    return Exit.USER_ERROR


def _explain_key(key: str, schema: type) -> str:
    """Explain what is wrong with an unknown key in a recipe."""
    if key in GROUPS:
        return f"The first line of a recipe in {key}/ must be: # @package _global_"
    return f"Unknown key {key}.{_similar(key, [known for known, _, _ in knobs(schema())])}"


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _explain(text: str) -> None:
    """Print an error. Under torchrun, also pass it to torchrun, whose final report shows the root cause."""
    print(text, file=sys.stderr)
    if name := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        path = Path(name)
        with contextlib.suppress(OSError):
            # If the exception is recorded already, keep its time: torchrun takes the earliest error as the root cause.
            when = path.stat().st_mtime if path.exists() else time.time()
            # This is torch's format; importing torch to write it would take two seconds.
            path.write_text(json.dumps({"message": text, "timestamp": str(int(when))}))


OPTIONS = """Options:
  -m, --multirun                              run all combinations of comma-separated values, one after the other
  --config-dir DIR                            folder with your own recipes (DIR/GROUP/OPTION.yaml) and modules
  --cfg job                                   print the composed configuration and exit
  --version                                   print the version and exit
"""
GROUPS_HELP = "Groups (GROUP=OPTION), each a folder of conf/:\n\n"
WIDTH, INDENT = 120, 46
"""Columns of the help, and the one where descriptions start."""


def _help(schema: type, examples: str, own: Sequence[tuple[str, Any, str]], roots: Sequence[Path], sweeps: bool) -> str:
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
    groups = "".join(f"{group}: {', '.join(_options(group, roots))}\n" for group in sorted(GROUPS))
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
