"""Resume a run: determine which configuration applies, and check which settings may change."""

from collections.abc import Callable
from pathlib import Path

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.find_weights import resolve_link
from moa_train.engine.state import check_form
from moa_train.knobs import knobs
from moa_train.plugins import check_trusted
from moa_train.runtime.command_line import argument
from moa_train.runtime.errors import UserError
from moa_train.schema import PLACES, RunConfig, own_code
from moa_train.serialization import from_dict


def resolve_resume(config: RunConfig, with_overrides: Callable[[RunConfig], RunConfig]) -> tuple[RunConfig, list[str]]:
    """Return the configuration to train with and, on a resume, the differences as ``key: old -> new``.

    ``resume=FOLDER`` uses the run's own configuration with the settings of this command. ``resume=auto`` uses the
    command's configuration, and starts a new run if ``run_dir`` holds no checkpoint.

    Args:
        config: the configuration composed from the command line.
        with_overrides: returns a configuration with the ``key=value`` arguments of the command line applied to it.

    Raises:
        UserError: there is nothing to resume, the folder belongs to another run, the run uses code that the command
            does not name, or a change would make it a different run.
    """
    folder = config.run_dir if config.resume in (None, "auto") else config.resume
    if folder is None:
        return config, []
    if config.resume is None:
        refuse_other_run(Path(folder))
        return config, []
    if config.resume != "auto":
        folder = str(run_of(Path(folder)))
    newest = CheckpointStore(Path(folder)).newest()
    if newest is None:
        if config.resume != "auto":
            raise UserError(f"resume={folder}: there is no checkpoint in {folder}/checkpoints to resume from.")
        return config, []
    before: RunConfig = from_dict(check_form(newest)["config"])
    check_trusted(own_code(before), [*config.code, *own_code(config)], f"The run {folder}")
    before.resume = before.engine.stop_after = None  # they applied only to the session that they started or ended
    now = config if config.resume == "auto" else with_overrides(before)
    now.run_dir, now.resume, now.replay, now.code = folder, config.resume, config.replay, config.code
    now.preflight = config.preflight
    if now.engine.micro_batch_size is None:
        now.engine.micro_batch_size = before.engine.micro_batch_size
    return now, changes(before, now)


def run_of(path: Path) -> Path:
    """Return the run folder of ``path``, which is a run folder, its checkpoints folder or a checkpoint in it.

    Raises:
        UserError: ``path`` is a checkpoint other than the newest one.
    """
    absolute = path.absolute()
    if absolute.name == "checkpoints":
        return absolute.parent
    if absolute.parent.name != "checkpoints":
        return path
    run_dir = absolute.parent.parent
    newest = CheckpointStore(run_dir).newest()
    if newest is not None and resolve_link(path).name != newest.path.name:
        raise UserError(
            f"resume={path}: a run is resumed from its newest checkpoint, step {newest.step}, with "
            f"{argument('resume', run_dir)}. To start a new run from the weights of another checkpoint: "
            f"{argument('init', path)}."
        )
    return run_dir


def refuse_other_run(folder: Path) -> None:
    """Raise `UserError` if ``folder``, in which a new run is to start, already holds a run."""
    if (newest := CheckpointStore(folder).newest()) is not None:
        raise UserError(
            f"run_dir={folder} already holds a run (step {newest.step}). To resume it: {argument('resume', folder)}. "
            "To start a new run, choose another run_dir."
        )


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """List the settings that differ as ``key: old -> new``.

    Raises:
        UserError: some changes would make it a different run. The message lists them.
    """
    old = {key: value for key, _, value in knobs(before)}
    changed = [(key, item, value) for key, item, value in knobs(now) if key not in PLACES and value != old[key]]
    fixed = [f"  {key}: {old[key]} -> {value}" for key, item, value in changed if item.metadata["fixed"]]
    if fixed:
        raise UserError(
            "A run cannot be resumed with these changes:\n" + "\n".join(fixed) + "\n"
            "Keep the old values, or start a new run from its weights: " + argument("init", now.run_dir)
        )
    return [f"{key}: {old[key]} -> {value}" for key, _, value in changed]
