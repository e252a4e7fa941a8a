"""Sweeps: several runs from one command line, ``-m key=a,b``. Hydra's grammar describes them; `runs` runs them."""

import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep

from moa_train.cli.compose import addable, compose, config_roots, is_override, typed
from moa_train.runtime.command_line import argument
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig, SweepConfig

FLAGS = ("-m", "--multirun")
SECTION = "sweep."
SEED = "runtime.seed"


def requested(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for a sweep."""
    return bool(set(FLAGS) & set(arguments))


def refuse_sweep_settings(config: RunConfig) -> None:
    """Raise `UserError` if a single run has settings that only a sweep uses."""
    if config.sweep != SweepConfig():
        raise UserError("Settings of the section sweep require -m, which starts several runs.")


def run(arguments: Sequence[str], config_name: str) -> int:
    """Run or continue a sweep, and return the exit code.

    Raises:
        UserError: a job is invalid, the arguments differ from those with which the sweep was started, or this process
            was started by torchrun.
    """
    from moa_train.runs.folder import SweepFolder, named
    from moa_train.runs.jobs import Runner, run_grid

    if "RANK" in os.environ:
        raise UserError(
            "-m cannot be used under torchrun, because each run of a sweep has its own processes. Start the sweep "
            "without torchrun, with sweep.ranks=N for N processes per run."
        )
    arguments = [text for text in arguments if text not in FLAGS]
    own = [text for text in arguments if text.startswith(SECTION)]
    if several := [text for text in own if _is_swept(text)]:
        raise UserError(f"{several[0]}: settings of the sweep itself have one value.")
    settings: SweepConfig = typed(compose(config_name, own, config_roots(arguments))).sweep
    stem = time.strftime("outputs/sweep-%Y%m%d-%H%M%S")
    unused = (
        path for number in itertools.count() if not (path := Path(f"{stem}-{number}" if number else stem)).exists()
    )
    folder = SweepFolder(Path(settings.dir) if settings.dir else next(unused))
    arguments = _continued(arguments, folder.arguments(), folder.path)
    sys.path += [str(root.resolve()) for root in config_roots(arguments)[1:]]  # with code of the user, as in app.run
    config, shared, swept = check(arguments, config_name)
    runner = Runner(folder, shared, config.sweep.ranks)
    again = f"moa-train -m {argument('sweep.dir', folder.path)}"
    if config.sweep.trials:
        from moa_train.data.dataset import available_splits
        from moa_train.runs.search import Search

        split = config.engine.eval_split
        if split == "none" or (split == "auto" and "val" not in available_splits(config.data)):
            raise UserError(
                "A search compares trials on validation images, and there are none. Hold out a part of the training "
                "images, for example with data.val_fraction=0.1."
            )

        folder.record(arguments)
        space, seeds = _space(swept)
        search = Search(folder, config, space, seeds)
        print(f"sweep: {config.sweep.trials} trials in {folder.path}. To continue it: {again}", flush=True)
        with runner.signals():
            search.run(runner)
        best = search.best()
        print(f"\n{f'best trial: {best}' if best else 'No trial is complete.'}")
    else:
        jobs = named(_grid(swept), [override.key_or_group for override in swept])
        folder.record(arguments, jobs)
        print(f"sweep: {len(jobs)} runs in {folder.path}. To continue it: {again}", flush=True)
        with runner.signals():
            run_grid(runner, jobs)
    print(f"leaderboard: moa-compare {shlex.quote(str(folder.path))}", flush=True)
    return _report(runner.outcomes, runner.codes, runner.stop, again)


def check(arguments: Sequence[str], config_name: str) -> tuple[RunConfig, list[str], list[Override]]:
    """Compose and validate all jobs of a grid, or trials at the edges of the search space.

    Returns:
        The configuration of the first job, the arguments that all jobs share, and the swept overrides.

    Raises:
        UserError: a setting cannot be swept, or a job is invalid.
    """
    shared, swept = _read(arguments)
    own, roots = [text for text in arguments if text.startswith(SECTION)], config_roots(arguments)
    searches = typed(compose(config_name, own, roots)).sweep.trials > 0
    jobs = list(_corners(*_space(swept))) if searches else _grid(swept)

    def composed(job: Sequence[str]) -> RunConfig:
        config: RunConfig = typed(compose(config_name, [*filter(is_override, shared), *own, *job], roots))
        return config

    configs = []
    for job in jobs:
        try:
            configs.append(composed(job))
        except UserError as error:
            try:
                composed([])
            except UserError as alone:
                if str(alone) == str(error):  # it is not due to a swept setting
                    raise
            line = shlex.join(job)
            raise UserError(f"{error}\nThis error is in the run {line}. No run of the sweep was started.") from error
    return configs[0], shared, swept


def _continued(arguments: list[str], before: list[str] | None, folder: Path) -> list[str]:
    """Return the arguments of a sweep without its folder: the given ones or, if there are none, the recorded ones.

    Raises:
        UserError: they would make it another sweep.
    """
    given = [text for text in arguments if not text.startswith(f"{SECTION}dir=")]
    own = [text for text in given if text.startswith(SECTION)]
    if before is None:
        if own == given and given != arguments:
            raise UserError(f"There is no sweep in {folder} to continue, and the command has no settings to start one.")
        return given
    if own == given:  # for example more trials
        keys = {text.partition("=")[0] for text in own}
        return [*(text for text in before if text.partition("=")[0] not in keys), *own]
    grid = not any(text.startswith(f"{SECTION}trials=") for text in before)
    axes = [{text.partition("=")[0] for text in some if _is_swept(text)} for some in (before, given)]
    free = axes[0] if grid and axes[0] == axes[1] else set()  # a new axis would rename the folders of all runs
    lost, new = (
        sorted(
            text
            for text in set(some) - set(others)
            if not text.startswith(SECTION) and text.partition("=")[0] not in free
        )
        for some, others in ((before, given), (given, before))
    )
    if lost or new:
        raise UserError(
            f"The sweep in {folder} was started with other arguments:\n"
            + "".join(f"  {sign} {text}\n" for sign, texts in (("-", lost), ("+", new)) for text in texts)
            + f"Continue it with the same ones, or just with -m {argument('sweep.dir', folder)}; a grid may get more "
            "values. For other settings, choose another sweep.dir."
        )
    return given


def _is_swept(text: str) -> bool:
    return is_override(text) and OverridesParser.create().parse_override(addable(text)).is_sweep_override()


def _read(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Return the arguments that all jobs share, and the swept overrides.

    Raises:
        UserError: a setting cannot be swept.
    """
    texts = [text for text in arguments if is_override(text)]
    overrides = OverridesParser.create().parse_overrides([addable(text) for text in texts])
    swept = [override for override in overrides if override.is_sweep_override()]
    fixed = [text for text, override in zip(texts, overrides, strict=True) if not override.is_sweep_override()]
    shared = [text for text in fixed if not text.startswith(SECTION)]
    for override in overrides:
        key = override.key_or_group
        if isinstance(override.value(), Glob):
            raise UserError(f"{override.input_line}: a sweep takes no patterns. List the options: {key}=A,B.")
        if key in ("run_dir", "resume", "replay", "preflight"):
            raise UserError(
                f"{override.input_line}: a sweep sets {key} itself. The runs are in the folder of the sweep, "
                "sweep.dir=FOLDER, and repeating the command continues them."
            )
    return [*(text for text in arguments if text not in texts), *shared], swept


def _grid(swept: Sequence[Override]) -> list[list[str]]:
    """Return the arguments of all combinations of the swept settings."""
    for override in swept:
        if isinstance(override.value(), IntervalSweep):
            raise UserError(
                f"{override.input_line}: an interval has infinitely many values. Set sweep.trials=N to search it, or "
                "list values: optim.lr=1e-4,1e-3."
            )
    values = [[f"{override.key_or_group}={text}" for text in override.sweep_string_iterator()] for override in swept]
    return [list(job) for job in itertools.product(*values)]


def _space(swept: Sequence[Override]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the search space, in the form that `Search` takes, and the seeds of every trial."""
    space = {override.key_or_group: _options(override) for override in swept}
    seeds = space.pop(SEED, {"choices": []})
    if not space:
        raise UserError("sweep.trials needs a search space, such as 'optim.lr=tag(log,interval(1e-4,1e-2))'.")
    if "choices" not in seeds:
        raise UserError(f"A search runs every trial with all seeds. List them: {SEED}=0,1,2.")
    return space, seeds["choices"]


def _options(override: Override) -> dict[str, Any]:
    """Return the values of a swept setting in a search."""
    value = override.value()
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        low, high = (float("nan") if bound is None else bound for bound in (value.start, value.end))
        if not low <= high or (log and low <= 0):
            rule = "log requires bounds above 0" if low <= high else "the lower bound exceeds the upper bound"
            raise UserError(f"{override.input_line}: {rule}. An example: {override.key_or_group}=interval(0.1,0.5).")
        return {"low": low, "high": high, "log": log, "step": None}
    if isinstance(value, RangeSweep) and not value.shuffle:
        last = list(value.range())[-1]
        last = float(f"{last:.12g}") if isinstance(last, float) else last  # not 0.7000000000000001, after 0.5 and 0.6
        return {"low": value.start, "high": last, "log": log, "step": None if log else value.step}
    assert isinstance(value, ChoiceSweep | RangeSweep), value
    return {"choices": [str(text) for text in override.sweep_string_iterator()]}


def _corners(space: Mapping[str, Mapping[str, Any]], seeds: Sequence[str]) -> Iterator[list[str]]:
    """Yield settings at the edges of a search space: each option and bound once."""
    edges = {key: options.get("choices") or [options["low"], options["high"]] for key, options in space.items()}
    base = {key: values[0] for key, values in edges.items()}
    if seeds:
        edges[SEED] = list(seeds)
    for key, values in edges.items():
        for value in values:
            yield [f"{name}={text}" for name, text in {**base, key: value}.items()]


def _report(outcomes: Mapping[str, str], codes: Sequence[int], stop: int | None, again: str) -> int:
    """List the runs that are not finished, and return the exit code of the sweep."""
    rest = {name: outcome for name, outcome in outcomes.items() if not outcome.startswith("finished")}
    if rest:
        print(f"{len(rest)} of {len(outcomes)} runs are not finished:", file=sys.stderr)
        print(*(f"  {outcome:24} {name}" for name, outcome in rest.items()), sep="\n", file=sys.stderr)
    if stop is not None or codes:
        print(f"To {'continue the sweep' if stop is not None else 'run these again'}: {again}", file=sys.stderr)
    return stop if stop is not None else max(codes, default=0)
