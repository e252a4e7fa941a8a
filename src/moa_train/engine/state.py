"""Everything that a resume needs, in one object."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moa_train.engine.checkpoint import Checkpoint
from moa_train.engine.optimizer_state import pack_optimizers, unpack_optimizers
from moa_train.optim.ema import AveragedWeights
from moa_train.optim.optimizers import Optimizers
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.tracking.meters import RunningMeans

HYPERPARAMETERS = ("lr", "weight_decay", "betas", "eps", "momentum")
"""Follow the configuration, also on a resume: there the user was told of every change."""


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
"""What state.json holds, with the scalars in ``train``."""


def check_form(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's state, in which all is there and of its type.

    Raises:
        UserError: it is not; what is missing is no default.
    """
    state = _updated(checkpoint.state)
    wrong = [key for key, kind in FORM.items() if not isinstance(state.get(key), kind)]
    train = {} if "train" in wrong else state["train"]
    wrong += [f"train.{key}" for key, kind in SCALARS.items() if type(train.get(key)) is not kind]
    if not wrong and train["step"] != checkpoint.step:
        wrong = ["train.step"]
    if wrong:
        raise UserError(
            f"{checkpoint.path}/state.json is not of this version: {', '.join(wrong)} missing, or of another form. "
            "It was written by another version, or changed by hand; to start anew from its weights: init=."
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
    """What changes while training. Order, augmentation and schedule are functions of ``step`` and need no state."""

    model: nn.Module
    optimizer: Optimizers
    precision: Precision
    ema: AveragedWeights | None = None
    step: int = 0
    evaluated_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # the best evaluation so far, with its step
    nonfinite: int = 0  # steps so far whose gradient was not finite
    lr_factor: float = 1.0  # on the schedule's learning rate, lowered by rollbacks
    meters: RunningMeans = field(default_factory=RunningMeans)  # of the log row that is not written yet

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of every file of a checkpoint, by file and name. They are the live ones."""
        tensors, _ = pack_optimizers(self.optimizer.parts, self.model.named_parameters())
        files = {"model": dict(self.model.state_dict()), "optimizer": tensors}
        return files if self.ema is None else {**files, "ema": self.ema.state_dict()}

    def scalars(self) -> dict[str, Any]:
        """Return the rest of the state, as JSON, but for the meters, of which every rank has its own."""
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
        """Take over a checkpoint's state, as the rank of that number.

        Raises:
            UserError: where something that this run needs is missing from it, or does not fit.
        """
        try:
            self._restore(checkpoint, _updated(checkpoint.state)["train"], rank)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"{checkpoint.path}/state.json lacks something that this run needs, or has it in another form "
                f"({type(error).__name__}: {error}). It was written by another version, or changed by hand."
            ) from error

    def _restore(self, checkpoint: Checkpoint, scalars: dict[str, Any], rank: int) -> None:
        if (self.ema is None) != (scalars["ema_updates"] is None):
            have, want = ("with", "without") if self.ema is None else ("without", "with")
            raise UserError(
                f"{checkpoint.path} was saved {have} averaged weights and this run goes on {want} them. "
                "Keep engine.ema_decay as it was, or start a new run with init=."
            )
        try:
            self.model.load_state_dict(checkpoint.tensors("model"), strict=True)
        except RuntimeError as error:
            differences = "\n".join(str(error).splitlines()[1:6])
            raise UserError(
                f"The weights in {checkpoint.path} are not of this run's model:\n{differences}\n"
                "They were written by another version of the code. Go on with that, or start a new run with init=."
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
        self.meters.load_state_dict(meters[rank % len(meters)])  # of more ranks than before some share one's sums
        self.step, self.evaluated_step = scalars["step"], scalars["evaluated_step"]
        self.best = scalars["best"]
        self.nonfinite, self.lr_factor = scalars["nonfinite"], scalars["lr_factor"]
