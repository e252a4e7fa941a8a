"""What the commands based on Hydra share: typed configuration, help and error messages."""

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from moa_train import __version__
from moa_train.cli import sweep
from moa_train.cli.compose import (
    GROUPS,
    addable,
    config_roots,
    hydra_options,
    readable,
    typed,
)
from moa_train.cli.help_text import help_text, own_settings
from moa_train.cli.overrides import check_overrides, similar
from moa_train.knobs import knobs
from moa_train.plugins import DATASETS
from moa_train.runtime.cpu import wait_briefly
from moa_train.runtime.errors import LostRankError, UserError
from moa_train.runtime.output import protect_output
from moa_train.runtime.signals import Exit


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
    if (hydra_options(arguments).cfg or {"--help", "-h"} & set(arguments)) and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback if `head` or a pager exits early
    if not hydra_options(arguments).info:  # Hydra has its own handler for these messages
        logging.basicConfig(format="%(message)s")
    logging.getLogger("moa_train").setLevel(logging.INFO)  # not the root logger, because libraries log a lot
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes exceptions through, and _guarded handles them

    def execute() -> int | None:
        for root in config_roots(arguments):
            if not root.is_dir():
                raise UserError(f"--config-dir {root}: there is no such folder.")
        if {"--help", "-h"} & set(arguments):
            # Hydra would compose every option of every group for its help, which takes a second.
            own = own_settings(arguments, config_name)
            print(help_text(schema, examples, own, config_roots(arguments), sweeps=multirun is not None))
            return None
        if not {"--hydra-help", "--shell-completion", "-sc"} & set(arguments):
            check_overrides(arguments, schema)
            if sweep.requested(arguments):
                if multirun is None:
                    raise UserError(
                        "-m is an option of moa-train, which starts several runs. Run this command once for each."
                    )
                if hydra_options(arguments).cfg:
                    raise UserError("-m cannot be combined with --cfg, because a sweep has many configurations.")
                return multirun(arguments, config_name)
        vars(hydra_utils)["argparse"] = SimpleNamespace(ArgumentParser=_HydraParser)
        # Options come first, because argparse accepts positional arguments only on one side of them.
        sys.argv[1:] = sorted(map(addable, arguments), key=lambda text: "=" in text and not text.startswith("-"))
        hydra.main(version_base="1.3", config_path="pkg://moa_train.conf", config_name=config_name)(checked)()
        return None

    sys.exit(_guarded(execute, arguments, schema))


class _HydraParser(argparse.ArgumentParser):
    """Hydra's parser of options, without abbreviations: --multi would pass the checks that look for --multirun.

    The help of one of Hydra's options is an object, but Python 3.14 and newer require a text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def add_argument(self, *names: str, help: object = "", **options: Any) -> argparse.Action:
        """Add an option."""
        return super().add_argument(*names, help=str(help), **options)


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
    return f"Unknown key {key}.{similar(key, [known for known, _, _ in knobs(schema())])}"


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
