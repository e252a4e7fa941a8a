"""moa-train: train, resume, fine-tune."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli import app
from moa_train.cli.resume import refuse_other_run, resolve_resume
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import Exit, StopSignals
from moa_train.schema import RunConfig, to_dict

if TYPE_CHECKING:
    from moa_train.build.run import Run
    from moa_train.engine.manifest import Checkpoint
    from moa_train.engine.trainer import Trainer
    from moa_train.runtime.distributed import Distributed

UNREADABLE = "unreadable.txt"
"""Lists, in the run folder, the training images that could not be read and were replaced (data.unreadable)."""

EXAMPLES = """moa-train: train a MOA-Transformer, or a model to compare it with.

  moa-train                                              digits, offline, about a minute on two cores
  moa-train model=moa_b data=cifar100 data.download=true
  moa-train model=moa_t data=imagenet data.root=/data/imagenet
  torchrun --nproc-per-node 8 -m moa_train.cli.train model=moa_t data=imagenet data.root=/data/imagenet
  moa-train resume=outputs/RUN                           go on where a run was stopped
  moa-train -m optim.lr=5e-4,1e-3,2e-3                   one run after the other
  moa-train model=swin_t data=cifar100 --cfg job         show the composed configuration, run nothing
  moa-train --config-dir my_conf experiment=mine         a recipe of your own, in my_conf/experiment/mine.yaml
  eval "$(moa-train --shell-completion install=bash)"    let the Tab key complete groups, options and keys"""


def train(config: RunConfig, overrides: list[str]) -> int:
    """Run a training to its end, or until it is asked to stop; return the exit code."""
    with StopSignals() as stop:
        return session(config, overrides, stop)


def session(config: RunConfig, overrides: list[str], stop: StopSignals) -> int:
    """Build the run, again after each roll-back, and train."""
    # torch takes seconds to import: only now that the configuration is known to be sound.
    import torch

    from moa_train.build.run import build_run
    from moa_train.build.runtime import build_runtime
    from moa_train.engine.nonfinite import RollBack
    from moa_train.runtime.distributed import Distributed
    from moa_train.tracking import provenance

    config, changed = resolve_resume(config, overrides)
    with (
        Distributed.start(config.runtime.device, config.runtime.timeout) as distributed,
        run_folder(config, distributed) as run_dir,
    ):
        build_runtime(config.runtime, distributed)
        distributed.check_same("configuration and code", {**to_dict(config), "code": provenance.source_digest()})
        # Only rank 0 saves.
        origin = provenance.collect(app.arguments_of_one_run(overrides)) if distributed.is_main else {}
        build = partial(
            build_run, config, run_dir=run_dir, distributed=distributed, stop=stop, origin=provenance.brief(origin)
        )
        if config.replay is not None:
            return replay(build(), config.replay)
        carried: dict[str, Any] = {}
        while True:
            run = build()
            vars(run.trainer.state).update(carried)
            distributed.on_main(partial(write_record, run, run_dir, origin))
            run.trainer.tracker.say(banner(run, distributed, changed))
            try:
                return conduct(run, distributed)
            except RollBack as order:
                run.trainer.tracker.say(str(order))
                carried = order.state
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"The memory of {distributed.device} is too small for {config.engine.micro_batch_size} images at "
                    "once. Set engine.micro_batch_size to a smaller divisor of engine.batch_size (the update stays the "
                    "same), or model.checkpointing=true."
                ) from error
            finally:
                run.trainer.tracker.close()


def conduct(run: "Run", distributed: "Distributed") -> int:
    """Train to the end or until a stop, say what came of it, and return the exit code."""
    outcome = report(run, distributed) if run.trainer.fit() else None
    if distributed.is_main:
        print(outcome or stopped(run))
    return Exit.FINISHED if outcome else Exit.STOPPED


def replay(run: "Run", step: int) -> int:
    """Repeat a run up to an update, and print where numbers are not finite there."""
    if step >= run.trainer.plan.total_steps:
        raise UserError(f"replay={step}: the updates of this run are 0 to {run.trainer.plan.total_steps - 1}.")
    ranks = run.trainer.replay(step)
    if run.trainer.distributed.is_main:
        print(json.dumps({"step": step, "ranks": ranks}, indent=1))
    return 0


@contextmanager
def run_folder(config: RunConfig, distributed: "Distributed") -> Iterator[Path]:
    """Yield the run folder, the same on every rank, and keep other runs out of it meanwhile."""
    from moa_train.runtime.lock import RunLock

    named = config.run_dir is not None
    with ExitStack() as held:

        def take() -> str:
            path = choose_run_dir(config)
            held.enter_context(RunLock(path))
            if config.resume is None:
                refuse_other_run(path)  # which may have ended only now
            return str(path)

        config.run_dir = distributed.on_main(take)
        path = Path(config.run_dir)
        try:
            yield path
        finally:
            if distributed.is_main and not named and {entry.name for entry in path.iterdir()} == {".lock"}:
                shutil.rmtree(path, ignore_errors=True)  # a mistake was found before anything was written


def choose_run_dir(config: RunConfig) -> Path:
    """Return the run folder: the one asked for, or a new one below outputs/, made here so that nobody else gets it."""
    if config.run_dir:
        return Path(config.run_dir)
    name = f"{config.data.name}-{config.model.variant}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        path = Path("outputs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:  # another run was started in the same second
            continue
        except OSError as error:
            raise UserError(f"Cannot make the run folder {path}: {error.strerror}. Choose one by run_dir=.") from error
    return path


def write_record(run: "Run", run_dir: Path, origin: dict[str, Any]) -> None:
    """Write the resolved configuration and where the run comes from, for people; checkpoints carry what they need."""
    from moa_train.tracking import provenance
    from moa_train.tracking.files import write_whole

    write_whole(run_dir / "config.json", json.dumps(to_dict(run.config), indent=2) + "\n")
    data = {split: source.describe() for split, source in run.sources.items()}
    provenance.write(run_dir, {**origin, "data": data, "first_step": run.trainer.state.step})


def banner(run: "Run", distributed: "Distributed", changed: list[str]) -> str:
    """Describe the run before it starts."""
    from moa_train.optim import explain_rate
    from moa_train.tracking.console import block

    config, trainer = run.config, run.trainer
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    optim, batch = config.optim, config.engine.batch_size
    micro = config.engine.micro_batch_size or batch
    rows = {
        "model": f"{config.model.variant}, {parameters / 1e6:.2f} M parameters",
        "data": ", ".join(f"{len(source):,} {split}" for split, source in run.sources.items())
        + f" images of {len(run.sources['train'].classes)} classes ({config.data.name})",
        "device": f"{distributed.device}, {distributed.world_size} rank(s), "
        f"{trainer.state.precision.name} (evaluation {config.runtime.eval_precision})",
        "batch": f"{batch} = {batch // micro} x {micro} examples",
        "rate": f"{optim.name} {explain_rate(optim.lr, batch, optim.lr_batch, optim.lr_scaling)}; "
        + trainer.schedule.describe(),
        "best by": f"top-1 on {trainer.eval_split}" if trainer.eval_split != "none" else "no choice: the last weights",
        "run": config.run_dir,
    }
    if trainer.state.step:
        rows["resumed"] = f"at step {trainer.state.step}" + "".join(f"; changed {change}" for change in changed)
    return block("moa-train", rows)


def report(run: "Run", distributed: "Distributed") -> str | None:
    """Evaluate the weights that the run yields, the best or the last ones; write the result and describe it.

    Returns None if a stop was asked for meanwhile.
    """
    from moa_train.build.evaluation import build_evaluation
    from moa_train.tracking.console import block
    from moa_train.tracking.files import write_whole

    trainer, state, run_dir = run.trainer, run.trainer.state, Path(run.config.run_dir or "")
    checkpoint = to_report(trainer)
    outcome: dict[str, Any] = {"step": checkpoint.step, "weights": str(checkpoint.path)}
    if state.best:
        outcome[trainer.eval_split] = state.best
    rows = {"weights": checkpoint.path, "logs": f"{run_dir}/metrics.jsonl; tensorboard --logdir {run_dir}"}
    if unreadable := quarantined(run, distributed):
        rows["unreadable"] = f"{unreadable} training images were replaced: {run_dir}/{UNREADABLE}"
        outcome["unreadable"] = unreadable
    if run.final_split != "none":
        run.model.load_state_dict(checkpoint.tensors("ema" if state.ema is not None else "model"))
        stop, source = trainer.stop, run.sources[run.final_split]
        result = build_evaluation(run.config, source, distributed, lambda: stop.requested)(run.model)
        if result is None:
            return None
        outcome[run.final_split] = result.as_dict()
        if distributed.is_main and not logged(run_dir, state.step, run.final_split):
            epoch = float(state.step / trainer.plan.steps_per_epoch)
            trainer.tracker.log_eval(state.step, {"epoch": epoch, **result.as_dict()}, run.final_split)
        trainer.tracker.close({f"{run.final_split}_{key}": value for key, value in result.as_dict().items()})
        accuracy = f"{result.top1:.2f} % top-1 ({result.top1_count:,} of {result.total:,} {run.final_split} images)"
        rows = {"accuracy": f"{accuracy}, {result.top5:.2f} % top-5", **rows, "next": f"moa-eval ckpt={run_dir}"}
    title, total = "done", trainer.plan.total_steps
    if state.step < total:
        title = f"step {state.step:,} of {total:,}: ends here as asked for"
        rows["go on"] = f"moa-train resume={run_dir}"
    if distributed.is_main:
        write_whole(run_dir / "result.json", json.dumps(outcome, indent=2) + "\n")
    return block(title, rows)


def to_report(trainer: "Trainer") -> "Checkpoint":
    """Return the checkpoint that the run yields: the best or, if none was chosen, the last.

    Raises:
        UserError: it is damaged or gone; with those that are whole.
    """
    from moa_train.engine.tensorfile import CheckpointError

    state, store = trainer.state, trainer.store
    try:
        return store.at(state.best["step"] if state.best else state.step)
    except CheckpointError as error:
        whole = {found.step: found.path for found in (store.best(), store.newest()) if found is not None}
        remedies = [f"\n  moa-eval ckpt={path}" for _, path in sorted(whole.items())]
        score = f", the best with {state.best['top1']:.2f} % top-1 on {trainer.eval_split}," if state.best else ""
        raise UserError(
            f"Training has ended and its last state is saved, but the checkpoint to report{score} is not whole: "
            f"{error}\nRestore it from a copy and resume the run, or evaluate one that is whole:{''.join(remedies)}"
        ) from error


def quarantined(run: "Run", distributed: "Distributed") -> int:
    """Add the unreadable files that all ranks met to the run folder's list, and return how many it holds."""
    from moa_train.tracking.files import write_whole

    met = [message for ranks in distributed.gather_objects(run.loader.quarantined) for message in ranks]
    path = Path(run.config.run_dir or "") / UNREADABLE

    def merge() -> int:
        messages = sorted({*met, *(path.read_text().splitlines() if path.exists() else ())})
        if met:
            write_whole(path, "".join(f"{message}\n" for message in messages))
        return len(messages)

    return int(distributed.on_main(merge))


def logged(run_dir: Path, step: int, split: str) -> bool:
    """Whether the result on ``split`` is in the log already: of a run that was resumed when it had ended."""
    from moa_train.tracking.jsonl import read_rows

    rows = read_rows(run_dir / "metrics.jsonl")
    return any(row["kind"] == "eval" and row["step"] == step and row["split"] == split for row in rows)


def stopped(run: "Run") -> str:
    """Say how to go on with a run that was asked to stop."""
    return f"Stopped at step {run.trainer.state.step}; saved. To go on: moa-train resume={run.config.run_dir}"


def main() -> None:
    """Entry point."""
    app.run(train, RunConfig, "train", EXAMPLES)


if __name__ == "__main__":
    main()
