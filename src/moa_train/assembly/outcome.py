"""The outcome of a finished run: final evaluation, result.json, and the summary on the console."""

import json
import shlex
from pathlib import Path
from typing import Any

from moa_train.assembly.commands import command
from moa_train.assembly.evaluation import build_evaluation
from moa_train.assembly.run import Run
from moa_train.engine.evaluator import Evaluation
from moa_train.engine.manifest import Checkpoint
from moa_train.engine.metrics import create_metrics
from moa_train.engine.predictions import OutcomeRecorder, predictions_file
from moa_train.engine.tensorfile import CheckpointError
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole
from moa_train.tracking.console import block

UNREADABLE = "unreadable.txt"
"""File in the run folder that lists the unreadable training images that were replaced (data.unreadable)."""


def report(run: Run, distributed: Distributed) -> str | None:
    """Evaluate the final weights (the best or the last ones), write result.json, and return a summary.

    Return None if a stop was requested during the evaluation.
    """
    trainer, state, run_dir = run.trainer, run.trainer.state, Path(run.config.run_dir or "")
    checkpoint = final_checkpoint(run)
    outcome: dict[str, Any] = {"step": checkpoint.step, "weights": str(checkpoint.path)}
    outcome["measured"] = trainer.record["measured"]
    outcome["higher_is_better"] = {
        name: metric.higher_is_better for name, metric in create_metrics(run.config.engine).items()
    }
    if state.best:
        outcome[trainer.eval_split] = state.best
    rows = {
        "weights": checkpoint.path,
        "logs": f"{run_dir}/metrics.jsonl; tensorboard --logdir {shlex.quote(str(run_dir))}",
    }
    if unreadable := quarantined(run, distributed):
        rows["unreadable"] = f"{unreadable} training images were replaced: {run_dir}/{UNREADABLE}"
        outcome["unreadable"] = unreadable
    if run.final_split != "none":
        run.model.load_state_dict(checkpoint.tensors("ema" if state.ema is not None else "model"))
        stop, source = trainer.stop, run.sources[run.final_split]
        recorder = OutcomeRecorder()
        evaluation = build_evaluation(
            run.config, source, distributed, lambda: stop.requested, record=recorder, threads=trainer.threads
        )
        result = evaluation(run.model)
        if result is None:
            return None
        outcomes = recorder.gather(distributed, source)
        if distributed.is_main:
            outcomes.write(predictions_file(run_dir, run.final_split))
        outcome[run.final_split] = result.as_dict()
        # The evaluation of the best checkpoint on the split that chose it is logged already, at its own step.
        if distributed.is_main and run.final_split != trainer.eval_split:
            epoch = float(state.step / trainer.plan.steps_per_epoch)
            trainer.tracker.log_eval(state.step, {"epoch": epoch, **result.as_dict()}, run.final_split)
        trainer.tracker.close({f"{run.final_split}_{key}": value for key, value in result.as_dict().items()})
        rows = {
            "result": describe(result, run.final_split),
            **rows,
            "next": evaluation_command(run, run_dir),
        }
    title, total = "done", trainer.plan.total_steps
    if state.step < total:
        title = f"stopped at step {state.step:,} of {total:,}, as engine.stop_after requests"
        rows["resume"] = command("moa-train", run.config, resume=run_dir)
    if distributed.is_main:
        write_whole(run_dir / "result.json", json.dumps(outcome, indent=2) + "\n")
    return block(title, rows)


def describe(result: Evaluation, split: str) -> str:
    """Describe the result of an evaluation in one line."""
    metrics = []
    for name, value in result.values.items():
        if name in ("top1", "top5"):
            hits = f" ({result.counts[name]:,} of {result.total:,} {split} images)" if name == "top1" else ""
            metrics.append(f"{value:.2f}% top-{name[-1]}{hits}")
        else:
            metrics.append(f"{name} {value:.4g}")
    return ", ".join(metrics)


def evaluation_command(run: Run, ckpt: Path) -> str:
    """Return the command that evaluates a run or a checkpoint on the split that the run reports."""
    split = {"split": run.final_split} if run.final_split == "val" else {}  # moa-eval's default is test
    return command("moa-eval", run.config, ckpt=ckpt, **split)


def final_checkpoint(run: Run) -> Checkpoint:
    """Return the checkpoint with the final weights: the best one or, if none was selected, the last one.

    Raises:
        UserError: the checkpoint is damaged or missing. The message lists valid ones.
    """
    trainer, state, store = run.trainer, run.trainer.state, run.trainer.store
    try:
        return store.at(state.best["step"] if state.best else state.step)
    except CheckpointError as error:
        valid = {found.step: found.path for found in (store.best(), store.newest()) if found is not None}
        remedies = ["\n  " + evaluation_command(run, path) for _, path in sorted(valid.items())]
        score = ""
        if state.best:
            score = f", the best one ({trainer.best_by} {state.best[trainer.best_by]:.4g} on {trainer.eval_split}),"
        raise UserError(
            f"Training is complete and its last state is saved, but the checkpoint to report{score} is damaged: "
            f"{error}\nRestore it from a copy and resume the run, or evaluate a valid one:{''.join(remedies)}"
        ) from error


def quarantined(run: Run, distributed: Distributed) -> int:
    """Add the unreadable files of all ranks to the list in the run folder, and return the length of the list."""
    met = [message for ranks in distributed.gather_objects(run.loader.quarantined) for message in ranks]
    path = Path(run.config.run_dir or "") / UNREADABLE

    def merge() -> int:
        messages = sorted({*met, *(path.read_text().splitlines() if path.exists() else ())})
        if met:
            write_whole(path, "".join(f"{message}\n" for message in messages))
        return len(messages)

    return int(distributed.on_main(merge))
