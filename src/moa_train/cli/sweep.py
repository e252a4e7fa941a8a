"""Sweeps: several runs from one command line, ``-m key=a,b``."""

import itertools
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
        UserError: a job is not valid, or two jobs would share one run folder.
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
            raise UserError(f"{error}\nThis is the run {line}. No run of the sweep was started.") from error
        if folder in folders:
            raise UserError(
                f"Two runs of the sweep would share run_dir={folder}: {folders[folder]} and {line}. Remove run_dir, so "
                "that each run gets a folder of its own below outputs/, or make it depend on what is swept: "
                "'run_dir=outputs/lr-${optim.lr}'."
            )
        if folder:
            folders[folder] = line


def report(outcomes: Sequence[tuple[int, Sequence[str]]]) -> None:
    """Exit with the worst code if runs of the sweep failed, after listing all runs.

    Args:
        outcomes: exit code and overrides of each run.
    """
    failed = [code for code, _ in outcomes if code]
    if failed:
        lines = [f"  {'failed' if code else 'done':8}{' '.join(overrides)}" for code, overrides in outcomes]
        print(f"error: {len(failed)} of {len(outcomes)} runs of the sweep failed:", *lines, sep="\n", file=sys.stderr)
        sys.exit(max(failed))


def arguments_of_one_run(overrides: Sequence[str]) -> list[str] | None:
    """Return what repeats the run of these ``overrides`` alone, if the command line is that of a sweep; else None."""
    if not requested(sys.argv[1:]):
        return None
    options = [text for text in sys.argv[1:] if text not in FLAGS and not is_override(text)]
    return [*options, *overrides]
