"""A training session: build the run, rebuild it after each rollback, and train until the end or a stop."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moa_train.assembly.commands import command
from moa_train.assembly.outcome import quarantined, report
from moa_train.assembly.process import set_up_process
from moa_train.assembly.run import Run, build_run
from moa_train.assembly.run_dir import run_folder
from moa_train.engine.nonfinite import RollBack
from moa_train.optim.scaling import explain_lr
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole
from moa_train.runtime.signals import Exit, StopRequestedError, StopSignals
from moa_train.schema import RunConfig
from moa_train.serialization import FromEnvironment
from moa_train.tracking import provenance
from moa_train.tracking.console import block


def run_session(config: RunConfig, changed: list[str], stop: StopSignals) -> int:
    """Train, starting or resuming the run in ``config.run_dir``, and return the exit code.

    Args:
        config: the configuration that `resolve_resume` returned.
        changed: settings that differ from the run's earlier sessions, as ``key: old -> new``.
        stop: the stop signals.
    """
    with (
        Distributed.start(config.runtime.device, config.runtime.timeout) as distributed,
        run_folder(config, distributed) as run_dir,
    ):
        set_up_process(config.runtime, distributed)
        distributed.check_same("configuration and code", {**asdict(config), "code": provenance.source_digest()})
        origin = provenance.collect() if distributed.is_main else {}  # only rank 0 saves
        build = partial(
            build_run, config, run_dir=run_dir, distributed=distributed, stop=stop, origin=provenance.brief(origin)
        )
        if config.replay is not None:
            return replay(build(), config.replay)
        rolled_back = origins = None
        while True:
            run = build(rolled_back=rolled_back, origins=origins)
            try:
                if run.trainer.state.step >= run.trainer.plan.total_steps:
                    refuse_untrained_changes(run, changed)  # and keep the records of what was trained
                elif rolled_back is None:  # a rollback is not another start
                    distributed.on_main(partial(write_record, run, run_dir, origin))
                run.trainer.tracker.say(banner(run, distributed, changed))
                return train(run, distributed)
            except RollBack as request:
                run.trainer.tracker.say(str(request))
                quarantined(run, distributed)
                rolled_back = request.with_traceback(None)  # its frames hold the discarded run
                origins = run.trainer.record["origin"]
            except StopRequestedError as error:
                newest, again = run.trainer.saved_step, command("moa-train", config, resume=config.run_dir)
                state = f"The newest checkpoint is from step {newest}. To resume: {again}"
                raise UserError(f"{error} {state if newest else 'There is no checkpoint yet.'}") from error
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UserError(
                    "Batch normalization needs more than one value per channel, but with engine.micro_batch_size="
                    f"{config.engine.micro_batch_size} and images of {config.data.image_size} pixels, a layer has one. "
                    "Set engine.micro_batch_size or data.image_size to a larger value."
                ) from error
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{distributed.device} ran out of memory with {config.engine.micro_batch_size} images per forward "
                    "pass. Set engine.micro_batch_size to a smaller divisor of engine.batch_size (mixing and dropout "
                    "are then drawn per micro-batch), or set model.checkpointing=true."
                ) from error
            finally:
                run.trainer.tracker.close()
                del run  # before the next one is built


def train(run: Run, distributed: Distributed) -> int:
    """Train until the end or a stop, print the outcome, and return the exit code."""
    outcome = None
    if run.trainer.fit():
        outcome = report(run, distributed)
    else:
        quarantined(run, distributed)  # the next session may not draw these images again
    if distributed.is_main:
        again = command("moa-train", run.config, resume=run.config.run_dir)
        stopped = f"Stopped at step {run.trainer.state.step}; saved. To resume: {again}"
        print(outcome or stopped)
    return Exit.FINISHED if outcome else Exit.STOPPED


def replay(run: Run, step: int) -> int:
    """Repeat a run up to an update, and print where NaN or infinity occurs in that update."""
    if step >= run.trainer.plan.total_steps:
        raise UserError(f"replay={step}: this run has updates 0 to {run.trainer.plan.total_steps - 1}.")
    ranks = run.trainer.replay(step)
    if run.trainer.distributed.is_main:
        print(json.dumps({"step": step, "ranks": ranks}, indent=1))
    return Exit.FINISHED


TRAINED = (
    "model.",
    "augment.",
    "loss.",
    "distill.",
    "optim.",
    "schedule.",
    "engine.micro",
    "engine.ema",
    "runtime.prec",
)
"""Prefixes of the settings that affect only training."""


def refuse_untrained_changes(run: Run, changed: list[str]) -> None:
    """Refuse changes to a finished run that would affect only training.

    Raises:
        UserError: there are such changes. The message lists them.
    """
    if lost := [change for change in changed if change.startswith(TRAINED)]:
        raise UserError(
            f"The run {run.config.run_dir} is finished: it has completed {run.trainer.state.step} steps, and "
            f"{run.trainer.plan.total_steps} are scheduled. These changes would have no effect:\n  "
            + "\n  ".join(lost)
            + "\nExtend the run with a longer schedule.duration, or start a new run from its weights with init=."
        )


def banner(run: Run, distributed: Distributed, changed: list[str]) -> str:
    """Describe the run before it starts."""
    config, trainer = run.config, run.trainer
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    batch = config.engine.batch_size
    micro = config.engine.micro_batch_size or batch
    rows = {
        "model": f"{config.model.title}, {parameters / 1e6:.2f} M parameters",
        "data": ", ".join(f"{len(source):,} {split}" for split, source in run.sources.items())
        + f" images of {len(run.sources['train'].classes)} classes ({config.data.name})",
        "device": f"{distributed.device}, {distributed.world_size} rank(s), "
        f"{trainer.state.precision.name} (evaluation {config.runtime.eval_precision})",
        "batch": f"{batch} = {batch // micro} x {micro} examples",
        "lr": f"{config.optim.name} {explain_lr(batch, config.optim)}; {trainer.schedule.describe()}"
        + (f"; x {trainer.state.lr_factor:g} after rollbacks" if trainer.state.lr_factor != 1 else ""),
        "best by": f"{trainer.best_by} on {trainer.eval_split}"
        if trainer.eval_split != "none"
        else "no evaluation: the last weights are reported",
        "run": config.run_dir,
    }
    if chosen := run.choices.describe():
        rows["chosen"] = chosen
    if trainer.state.step:
        rows["resumed"] = f"at step {trainer.state.step}" + "".join(f"; changed {change}" for change in changed)
    return block("moa-train", rows)


def write_record(run: Run, run_dir: Path, origin: dict[str, Any]) -> None:
    """Write the configuration and the origin of the run for the user; resuming reads only checkpoints."""
    write_whole(run_dir / "config.json", json.dumps(run.trainer.record["config"], indent=2) + "\n")
    (run_dir / "result.json").unlink(missing_ok=True)  # of a session that ended earlier
    data, root = {split: source.describe() for split, source in run.sources.items()}, run.config.data.root
    if isinstance(root, FromEnvironment):
        for source in data.values():
            source["root"] = str(source.get("root", "")).replace(root, root.expression)
    facts = {"data": data, "choices": run.choices.as_dict(), "first_step": run.trainer.state.step}
    provenance.write(run_dir, {**origin, **facts})
