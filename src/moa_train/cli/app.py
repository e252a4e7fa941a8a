"""The frame of the commands that Hydra composes: typed configuration, help, and errors for users."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import moa_train.conf
from moa_train.runtime.errors import UserError, nearest
from moa_train.runtime.signals import Exit
from moa_train.schema import knobs, validate

CONF = Path(moa_train.conf.__file__).parent
GROUPS = {folder.name: folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "__pycache__"}
"""The groups of the configuration: a folder each, a YAML file per option."""


def run(task: Callable[[Any, list[str]], int | None], schema: type, config_name: str, examples: str) -> None:
    """Compose a configuration from the command line, check it, and run ``task`` with it; never returns.

    Args:
        task: called with the typed, validated configuration and the overrides as typed; returns the exit code.
        schema: dataclass of the configuration.
        config_name: primary YAML file below ``conf/``, whose defaults list names the schema.
        examples: shown at the end of ``--help``.
    """
    store = ConfigStore.instance()
    store.store(name=f"{config_name}_schema", node=schema)
    store.store(group="hydra/help", name=f"{config_name}_help", node=_help(schema, examples))

    def checked(config: DictConfig) -> None:
        # Inside Hydra's task, so that --help, --cfg and multirun stay Hydra's.
        code = _guarded(lambda: task(typed(config), list(HydraConfig.get().overrides.task)))
        if code:
            sys.exit(code)

    if not {"--help", "-h", "--hydra-help", "--version"} & set(sys.argv[1:]):
        code = _guarded(lambda: check_overrides(sys.argv[1:], schema))
        if code:
            sys.exit(code)
    hydra.main(version_base="1.3", config_path="pkg://moa_train.conf", config_name=config_name)(checked)()


def typed(config: DictConfig) -> Any:
    """Return the composed configuration as its dataclass, validated."""
    result = OmegaConf.to_object(config)
    validate(result)
    return result


def check_overrides(arguments: list[str], schema: type) -> None:
    """Check ``key=value`` arguments before Hydra composes anything.

    Raises:
        UserError: for unknown keys, options and groups, with the nearest right name, and for values of the wrong type.
    """
    texts = [text for text in arguments if "=" in text and not text.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(texts)
    except HydraException as error:
        raise UserError(f"Cannot read the arguments: {str(error).splitlines()[0]}") from None
    stray = [text for text in arguments if "=" not in text and not text.startswith(("-", "~"))]
    if stray and not any(text.startswith("-") for text in arguments):
        raise UserError(f"{stray[0]!r} is not an argument of the form key=value. See --help.")
    keys = [key for key, _, _ in knobs(schema())]
    for override in overrides:
        _check_override(override, schema, keys)


def _check_override(override: Override, schema: type, keys: list[str]) -> None:
    key, text = override.key_or_group, override.input_line or ""
    if key.startswith("hydra") or override.is_delete():
        return
    if key in GROUPS and not text.startswith("++"):
        if not override.is_sweep_override():
            _check_option(key, override.value(), GROUPS[key])
    elif key not in keys:
        sections = {key.rsplit(".", depth)[0] for key in keys for depth in (1, 2) if "." in key}
        if key in sections:  # a whole section, as in model={patch_size:4}
            return
        near = nearest(key, [*keys, *GROUPS]) or nearest(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys])
        raise UserError(f"There is no {key}.{near} `--help` lists every key.")
    elif not override.is_sweep_override():
        try:
            OmegaConf.update(OmegaConf.structured(schema), key, override.value())
        except OmegaConfBaseException as error:
            raise UserError(f"{text}: {str(error).splitlines()[0]}.") from None


def _check_option(group: str, option: Any, folder: Path) -> None:
    options = sorted(path.stem for path in folder.glob("*.yaml"))
    if option is not None and str(option) not in options:
        raise UserError(
            f"{group}={option} is not known.{nearest(option, options)} Options: {', '.join(options) or 'none'}."
        )


def _guarded(action: Callable[[], int | None]) -> int:
    """Run ``action``; what users can mend is printed without a traceback."""
    try:
        return action() or Exit.FINISHED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.USER_ERROR


def _help(schema: type, examples: str) -> dict[str, str]:
    lines: list[str] = []
    section = ""
    for key, item, value in knobs(schema()):
        head = key.rpartition(".")[0]
        if head != section:
            lines.append("")
            section = head
        rule = item.metadata
        options = f" [{', '.join(rule['options'])}]" if rule["options"] else ""
        lines.append(f"  {key + '=' + _shown(value):<44}{rule['help']}{options}")
    knob_text = "\n".join(lines).replace("$", "$$")
    return {
        "app_name": Path(sys.argv[0]).name,
        "header": "",
        "footer": "",
        "template": f"{examples}\n\nGroups (group=option; a folder of conf/ each)\n\n$APP_CONFIG_GROUPS\n"
        f"Keys (key=value): default and meaning; --cfg job shows what the groups make of them\n{knob_text}\n",
    }


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
