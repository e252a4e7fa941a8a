"""Going on with a run: which configuration holds, what may change and what may not."""

import copy
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from moa_train.cli.app import GROUPS
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig, from_dict, knobs, validate

_PLACES = (
    "run_dir",
    "resume",
    "replay",
    "init",
    "init_head",
)  # say where a run lies and where it came from, not what it is


def resolve_resume(config: RunConfig, overrides: list[str]) -> tuple[RunConfig, list[str]]:
    """Return the configuration to train with and, on a resume, what differs from before as ``key: old -> new``.

    ``resume=FOLDER`` takes the run's own configuration, on which the command's ``key=value`` arguments are laid.
    ``resume=auto`` takes the command's, and starts afresh where ``run_dir`` holds no checkpoint.

    Raises:
        UserError: nothing to resume, a folder in use by another run, or a change that would make it another run.
    """
    from moa_train.engine.checkpoint import CheckpointStore
    from moa_train.engine.state import check_form

    folder = config.run_dir if config.resume in (None, "auto") else config.resume
    if folder is None:
        return config, []
    if config.resume is None:
        refuse_other_run(Path(folder))
        return config, []
    newest = CheckpointStore(Path(folder)).newest()
    if newest is None:
        if config.resume != "auto":
            raise UserError(f"resume={folder}: there is no checkpoint in {folder}/checkpoints to go on from.")
        return config, []
    before: RunConfig = from_dict(check_form(newest)["config"])
    before.resume = before.engine.stop_after = None  # were meant for the session that they began or ended
    now = config if config.resume == "auto" else overlaid(before, overrides)
    now.run_dir, now.resume, now.replay = folder, config.resume, config.replay
    if now.engine.micro_batch_size is None:
        now.engine.micro_batch_size = before.engine.micro_batch_size
    return now, changes(before, now)


def refuse_other_run(folder: Path) -> None:
    """Raise UserError if ``folder`` holds a run, for one that is to start there."""
    from moa_train.engine.checkpoint import CheckpointStore

    if (newest := CheckpointStore(folder).newest()) is not None:
        raise UserError(
            f"run_dir={folder} holds a run already (step {newest.step}). To go on with it: resume={folder}. "
            "To start another: choose another run_dir."
        )


def overlaid(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Return ``config`` with ``key=value`` arguments laid over it."""
    result = OmegaConf.structured(copy.deepcopy(config))
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key in GROUPS:
            raise UserError(
                f"{override.input_line}: resume takes the groups from the run; change single values of it, such as "
                "optim.lr=1e-4, or start a new run from its weights with init=."
            )
        if key not in _PLACES and not key.startswith("hydra"):
            OmegaConf.update(result, key, override.value())
    typed: Any = OmegaConf.to_object(result)
    validate(typed)
    return typed


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """List the knobs that differ as ``key: old -> new``.

    Raises:
        UserError: listing those that make it another run.
    """
    old = {key: value for key, _, value in knobs(before)}
    changed = [(key, item, value) for key, item, value in knobs(now) if key not in _PLACES and value != old[key]]
    fixed = [f"  {key}: {old[key]} -> {value}" for key, item, value in changed if item.metadata["fixed"]]
    if fixed:
        raise UserError(
            "A run cannot go on with these changes:\n" + "\n".join(fixed) + "\n"
            "Leave them as they were, or start a new run from its weights: init=" + str(now.run_dir)
        )
    return [f"{key}: {old[key]} -> {value}" for key, _, value in changed]
