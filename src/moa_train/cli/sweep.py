"""Run sweeps: several runs from one command line, ``-m key=a,b``."""

import itertools
import shlex
import sys
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

from moa_train.cli.compose import addable, compose, config_roots, is_override, typed
from moa_train.runtime.errors import UserError

FLAGS = ("-m", "--multirun")


def requested(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for a sweep."""
    return bool(set(FLAGS) & set(arguments))


def check_jobs(arguments: Sequence[str], config_name: str) -> None:
    """Compose and validate every job of a sweep before the first one starts.

    Raises:
        UserError: a job is invalid, or two jobs would share a run folder.
    """
    overrides = OverridesParser.create().parse_overrides([addable(text) for text in arguments if is_override(text)])
    values = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line or ""]
        for override in overrides
    ]
    folders: dict[str, str] = {}
    for job in itertools.product(*values):
        line = " ".join(job)
        try:
            folder = getattr(typed(compose(config_name, job, config_roots(arguments))), "run_dir", None)
        except UserError as error:
            raise UserError(f"{error}\nThis error is in the run {line}. No run of the sweep was started.") from error
        if folder in folders:
            raise UserError(
                f"Two runs of the sweep would share run_dir={folder}: {folders[folder]} and {line}. Remove run_dir, so "
                "that each run gets its own folder below outputs/, or make it depend on the swept settings: "
                "'run_dir=outputs/lr-${optim.lr}'."
            )
        if folder:
            folders[folder] = line


def report(outcomes: Sequence[tuple[int, Sequence[str]]]) -> None:
    """If runs of the sweep failed, list all runs and exit with the highest code.

    Args:
        outcomes: exit code and overrides of each run.
    """
    failed = [code for code, _ in outcomes if code]
    if failed:
        lines = [f"  {'failed' if code else 'done':8}{shlex.join(overrides)}" for code, overrides in outcomes]
        print(f"error: {len(failed)} of {len(outcomes)} runs of the sweep failed:", *lines, sep="\n", file=sys.stderr)
        sys.exit(max(failed))


def arguments_of_one_run(overrides: Sequence[str]) -> list[str] | None:
    """Return the arguments that repeat one run of a sweep, given its ``overrides``, or None if this is no sweep."""
    if not requested(sys.argv[1:]):
        return None
    options = [text for text in sys.argv[1:] if text not in FLAGS and not is_override(text)]
    return [*options, *overrides]
