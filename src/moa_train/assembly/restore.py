"""Restore a run from its newest checkpoint, and check whether its best score is still valid."""

from typing import Any

from moa_train.assembly.checks import check_same_data
from moa_train.assembly.evaluation import measurement
from moa_train.assembly.inputs import validation_split
from moa_train.data.source import Source
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.manifest import Checkpoint
from moa_train.engine.state import TrainState, check_form
from moa_train.engine.tensorfile import CheckpointError, UnreadableError
from moa_train.plugins import short_name
from moa_train.runtime.distributed import Distributed
from moa_train.schema import RunConfig
from moa_train.serialization import from_dict


def restore(
    state: TrainState, checkpoint: Checkpoint, record: dict[str, Any], distributed: Distributed
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Restore a checkpoint after checking that it belongs to this data.

    Returns:
        The origins of all earlier starts, and the full content of its state.json.
    """
    distributed.check_same(f"the files of {checkpoint.path}", checkpoint.digest)
    before = check_form(checkpoint)
    check_same_data(before, record)
    state.restore(checkpoint, distributed.rank)
    return before["origin"], before


def reset_best(
    state: TrainState, before: dict[str, Any], now: dict[str, Any], sources: dict[str, Source]
) -> str | None:
    """Discard the best score if scores were measured differently before this start, and return a message about it."""
    old = before.get("measured")
    if old is None:  # written by an older version
        config: RunConfig = from_dict(before["config"])
        old = measurement(config, validation_split(config, sources), sources)
    if old == now:
        return None
    best, state.best, state.evaluated_step = state.best, {}, 0
    score = best.get(short_name(now["metric"]))
    changed = ", ".join(f"{key} {old.get(key)} -> {value}" for key, value in now.items() if old.get(key) != value)
    if score is None:
        return None
    return (
        f"The search for the best checkpoint restarts at step {state.step}, because the best score so far ({score:.4g} "
        f"at step {best['step']}) was measured differently: {changed}. "
        f"The checkpoint of step {best['step']} is kept."
    )


def replace_lost_best(state: TrainState, store: CheckpointStore, distributed: Distributed) -> str | None:
    """Replace the best score if its checkpoint is lost, because no later one might reach it, and return a message."""

    def find() -> dict[str, Any] | None:
        try:
            store.at(state.best["step"])
        except UnreadableError:
            raise
        except CheckpointError:
            found = store.best()
            return found.state["train"]["best"] if found else {}
        return None

    step = state.best.get("step")
    if not state.best or (best := distributed.on_main(find)) is None:
        return None
    state.best, state.evaluated_step = best, 0  # the current weights may be better than the checkpoint that is left
    now = f"The best one is now that of step {best['step']}." if best else "No other one has a score."
    return f"The checkpoint of step {step}, the best one so far, is missing or damaged. {now}"
