"""Everything that a resume restores, in one object."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moa_train.engine.checkpoint import Checkpoint
from moa_train.engine.optimizer_state import pack_optimizers, unpack_optimizers
from moa_train.interfaces import Classifier
from moa_train.optim.ema import AveragedWeights
from moa_train.optim.optimizers import Optimizers
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.tracking.meters import RunningMeans

HYPERPARAMETERS = ("lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "fused", "foreach")
"""Entries of parameter groups that a resume takes from the configuration and the device, not from the checkpoint."""

FORM = {"config": dict, "classes": list, "fingerprint": str, "origin": list, "train": dict}
SCALARS = {
    "step": int,
    "evaluated_step": int,
    "nonfinite": int,
    "lr_factor": float,
    "best": dict,
    "optimizer": list,
    "meters": list,
}
"""Required entries of state.json and of its section ``train``, with their types."""


def check_form(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json, after checking that every entry exists and has its type.

    Raises:
        UserError: entries are missing or of another type.
    """
    state = _updated(checkpoint.state)
    wrong = [key for key, kind in FORM.items() if not isinstance(state.get(key), kind)]
    train = {} if "train" in wrong else state["train"]
    wrong += [f"train.{key}" for key, kind in SCALARS.items() if type(train.get(key)) is not kind]
    if not wrong and train["step"] != checkpoint.step:
        wrong = ["train.step"]
    if wrong:
        raise UserError(
            f"{checkpoint.path}/state.json cannot be resumed: {', '.join(wrong)} missing or of the wrong type. It was "
            "written by another version of moa-train or edited. To start a new run from its weights, use init=."
        )
    return state


def _updated(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint of version 0.1 under today's names."""
    train = state.get("train")
    if not isinstance(train, dict):
        return state
    train = {{"rate_factor": "lr_factor"}.get(key, key): value for key, value in train.items()}
    if isinstance(train.get("optimizer"), list):
        train["optimizer"] = [
            {
                **entry,
                "groups": [
                    {{"rate_scale": "lr_scale"}.get(key, key): value for key, value in group.items()}
                    for group in entry["groups"]
                ],
            }
            for entry in train["optimizer"]
        ]
    return {**state, "train": train}


@dataclass
class TrainState:
    """Everything that changes during training. Data order, augmentation and schedule are functions of ``step``.

    Attributes:
        step: number of updates so far.
        evaluated_step: ``step`` at the last evaluation.
        best: result of the best evaluation so far, with its step; empty before the first one.
        nonfinite: number of skipped updates so far.
        lr_factor: factor on the schedule's learning rate, which rollbacks lower.
        meters: running means for the next log row.
    """

    model: Classifier
    optimizer: Optimizers
    precision: Precision
    ema: AveragedWeights | None = None
    step: int = 0
    evaluated_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    nonfinite: int = 0
    lr_factor: float = 1.0
    meters: RunningMeans = field(default_factory=RunningMeans)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of every file of a checkpoint, by file and name: the live ones, not copies."""
        tensors, _ = pack_optimizers(self.optimizer.parts, self.model.named_parameters())
        files = {"model": dict(self.model.state_dict()), "optimizer": tensors}
        return files if self.ema is None else {**files, "ema": self.ema.state_dict()}

    def scalars(self) -> dict[str, Any]:
        """Return the rest of the state as JSON, except for the meters, which differ between ranks."""
        _, optimizer = pack_optimizers(self.optimizer.parts, self.model.named_parameters())
        return {
            "step": self.step,
            "optimizer": optimizer,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "nonfinite": self.nonfinite,
            "lr_factor": self.lr_factor,
            "scaler": self.precision.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema is not None else None,
        }

    def restore(self, checkpoint: Checkpoint, rank: int = 0) -> None:
        """Restore the state from a checkpoint; ``rank`` selects the meters.

        Raises:
            UserError: something that this run needs is missing or does not fit.
        """
        try:
            self._restore(checkpoint, _updated(checkpoint.state)["train"], rank)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"{checkpoint.path}/state.json cannot be restored ({type(error).__name__}: {error}). It was written by "
                "another version of moa-train or edited. To start a new run from its weights, use init=."
            ) from error

    def _restore(self, checkpoint: Checkpoint, scalars: dict[str, Any], rank: int) -> None:
        if (self.ema is None) != (scalars["ema_updates"] is None):
            saved, now = ("with", "without") if self.ema is None else ("without", "with")
            raise UserError(
                f"{checkpoint.path} was saved {saved} EMA weights, but this run is configured {now} them. Keep "
                "engine.ema_decay as it was, or start a new run from its weights with init=."
            )
        try:
            self.model.load_state_dict(checkpoint.tensors("model"), strict=True)
        except RuntimeError as error:
            differences = "\n".join(str(error).splitlines()[1:6])
            raise UserError(
                f"The weights in {checkpoint.path} do not fit the model of this run:\n{differences}\n"
                "They were written by another version of the code. Resume with that version, or start a new run with "
                "init=."
            ) from error
        unpack_optimizers(
            self.optimizer.parts,
            self.model.named_parameters(),
            checkpoint.tensors("optimizer"),
            scalars["optimizer"],
            keep=HYPERPARAMETERS,
        )
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.tensors("ema"), scalars["ema_updates"])
        if self.precision.scaler.is_enabled() and scalars["scaler"]:
            self.precision.scaler.load_state_dict(scalars["scaler"])
        meters = scalars["meters"]
        self.meters.load_state_dict(meters[rank % len(meters)])  # with more ranks than before, some get the same
        self.step, self.evaluated_step = scalars["step"], scalars["evaluated_step"]
        self.best = scalars["best"]
        self.nonfinite, self.lr_factor = scalars["nonfinite"], scalars["lr_factor"]
