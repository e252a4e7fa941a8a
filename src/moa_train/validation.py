"""Check the settings of a command: ranges, options, and rules that span several settings."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from moa_train.knobs import check_entries, knobs
from moa_train.plugins import DATASETS, short_name
from moa_train.runtime.errors import UserError, check_all, nearest
from moa_train.schema import RunConfig, compile_mode, image_shape, parts, thread_count


def validate(config: Any) -> None:
    """Check ranges, options and the rules that span several settings of a command's configuration.

    Raises:
        UserError: there are mistakes. The message lists all of them, each with the key, the value and what is allowed.
    """
    checks: list[Callable[[], object]] = [partial(_check_value, *setting) for setting in knobs(config)]
    if isinstance(config, RunConfig):
        checks += [
            partial(compile_mode, config.runtime.compile),
            partial(thread_count, config.runtime.threads),
            partial(image_shape, config.data.image_size),
            partial(_check_rules, config),
        ]
    check_all(checks)
    if isinstance(config, RunConfig):
        check_all(partial(kind.args, name, values, key) for kind, name, values, key in parts(config))
        check = getattr(DATASETS.load(config.data.name), "check", None)
        if check is not None:
            check(config.data)


def _check_value(key: str, item: Any, value: Any) -> None:
    if value == "":
        raise UserError(f"{key} is empty, perhaps because a shell variable is not set. Leave it out, or set it.")
    if not isinstance(value, dict):
        check_entries(key, value, item.metadata)


def _check_rules(config: RunConfig) -> None:
    if broken := list(_broken_rules(config)):
        raise UserError("\n".join(broken))


def _broken_rules(config: RunConfig) -> Iterator[str]:
    """Yield a message for each violated rule that spans several settings."""
    data, augment, optim, engine = config.data, config.augment, config.optim, config.engine
    if str(config.runtime.compile).lower() == "false" and config.runtime.compile_for != "default":
        yield (
            f"runtime.compile_for={config.runtime.compile_for} has no effect with runtime.compile=false. Set "
            "runtime.compile to blocks or model."
        )
    for key, entries, length in (
        ("augment.scale", augment.scale, 2),
        ("augment.ratio", augment.ratio, 2),
        ("optim.betas", optim.betas, 2),
        ("data.range", data.range, 2),
        ("data.mean", data.mean, 3),
        ("data.std", data.std, 3),
    ):
        if entries is not None and len(entries) != length:
            yield f"{key}={entries} must have {length} entries."
        elif entries and key.startswith(("augment", "data.range")) and entries[0] > entries[1]:
            yield f"{key}={entries}: the lower bound exceeds the upper bound."
    micro = engine.micro_batch_size
    if micro and engine.batch_size % micro:
        yield (
            f"engine.batch_size={engine.batch_size} is not a multiple of engine.micro_batch_size={micro}. "
            f"The nearest multiples are: {_multiples_near(engine.batch_size, micro)}."
        )
    for key, names in (
        ("engine.metrics", engine.metrics),
        ("augment.extra", augment.extra),
        ("tracking.loggers", config.tracking.loggers),
    ):
        if len({short_name(name) for name in names}) < len(names):
            yield f"{key}={names}: two entries have the same name."
    metrics = [short_name(name) for name in engine.metrics]
    if short_name(engine.best_by) not in metrics:
        yield f"engine.best_by={engine.best_by} must be one of engine.metrics: {', '.join(metrics)}."
    if config.schedule.name == "step" and not config.schedule.milestones:
        yield "schedule.name=step requires schedule.milestones, for example ['50%','75%']."
    if config.resume not in (None, "auto") and config.run_dir:
        yield (
            f"resume={config.resume} continues the run in its own folder, so run_dir={config.run_dir} would have no "
            "effect. Leave it out, or start a new run there from the weights with init=."
        )
    if config.resume not in (None, "auto") and config.init:
        yield "resume continues a run, and init starts a new run from weights. Give only one of the two."
    if config.init and config.model.name == "timm" and config.model.args.get("pretrained"):
        yield "init and model.args.pretrained both name the weights to start from. Give only one of the two."
    if config.init_head != "strict" and not config.init:
        yield f"init_head={config.init_head} requires init=WEIGHTS, the weights to start from."
    if config.replay is not None and config.resume in (None, "auto"):
        yield f"replay={config.replay} requires resume=FOLDER, the run whose update to repeat."
    if config.resume == "auto" and not config.run_dir:
        yield "resume=auto requires run_dir=FOLDER; without it, every start would use a new folder."
    for section in fields(config):
        yield from _unused_args(section.name, getattr(config, section.name))


def _unused_args(section: str, values: Any) -> Iterator[str]:
    """Yield a message for each entry of ``args`` that belongs to none of the parts that a section lists."""
    lists = [item for item in fields(values) if item.metadata.get("plugins")] if is_dataclass(values) else []
    lists = [item for item in lists if isinstance(getattr(values, item.name), list)]
    names = [short_name(name) for item in lists for name in getattr(values, item.name)]
    known = {*names, *(name for item in lists for name in item.metadata["plugins"].configurable)}
    for name in values.args if names else ():
        if name not in known:
            key = " and ".join(f"{section}.{item.name}" for item in lists)
            entries = ", ".join(names)
            yield f"{section}.args.{name} belongs to no entry of {key}.{nearest(name, known)} Entries: {entries}."


def _multiples_near(value: int, unit: int) -> str:
    low, high = value // unit * unit, -(-value // unit) * unit
    return " or ".join(str(number) for number in (low, high) if number)
