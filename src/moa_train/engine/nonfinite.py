"""Numbers that are not finite: noticed before they are applied, on every rank alike, and traced to where they arise."""

import json
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa_train.optim.optimizers import Optimizers
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.tracking.files import write_whole


class RollBack(Exception):  # noqa: N818 a request, not an error
    """Asks to rebuild the run from its last checkpoint.

    Attributes:
        nonfinite: number of non-finite gradients so far, which the checkpoint does not know of.
        lr_factor: factor on the learning rate from there on.
    """

    def __init__(self, message: str, nonfinite: int, lr_factor: float) -> None:
        super().__init__(message)
        self.nonfinite, self.lr_factor = nonfinite, lr_factor


class GradientGuard:
    """Keeps updates from being made with a gradient that is not finite, and tells of them afterwards.

    The norm of the reduced gradient is the same on every rank, and so is all that follows from it. Where reading it
    costs nothing (on a CPU, or with fp16, whose scaler waits for the device anyway) or an optimizer cannot skip an
    update by itself, it is read at once. Otherwise the fused kernels skip (``found_inf``), and the host, which
    must not wait for the device, hears of it ``delay`` steps later: on every rank after the same step.
    """

    def __init__(self, optimizer: Optimizers, precision: Precision, delay: int | None = None) -> None:
        self.optimizer, self.scaler = optimizer, precision.scaler
        skips = all(getattr(part, "_step_supports_amp_scaling", False) for part in optimizer.parts)
        if delay is None:
            delay = 2 if precision.device.type == "cuda" and skips and not self.scaler.is_enabled() else 0
        self.delay = delay
        self.found: Tensor | None = None  # 1 on the device if the update under way is to be skipped; None: not needed
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def admits(self, step: int, grad_norm: Tensor) -> bool:
        """Whether update ``step`` is to be made, as far as the host knows: with `found`, kernels may skip it still."""
        # The first one is always read: fused SGD that skips it would leave its momentum uninitialised (torch 2.15).
        if self.delay and all(part.state for part in self.optimizer.parts):
            self.found = (~grad_norm.isfinite()).float()
            for part in self.optimizer.parts:
                part.found_inf = self.found  # type: ignore[attr-defined]
            host, copied = self.found.to("cpu", non_blocking=True), None
            if self.found.is_cuda:
                copied = torch.cuda.Event()
                copied.record()
            self._pending.append((step, host, copied))
            return True
        self.found = None
        if math.isfinite(grad_norm):
            return True
        # An overflow with a scale above 1 is the scale's fault, and the scaler's business: it halves it.
        if not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            self._pending.append((step, torch.ones(()), None))
        return False

    def caught(self, wait: bool = False) -> Iterator[int]:
        """Yield the steps that were skipped and not yet told of; ``wait``: up to the last one."""
        while len(self._pending) > (0 if wait or not self.delay else self.delay):
            step, found, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()  # of work that is ``delay`` steps old
            if found:
                yield step


@dataclass
class NonFinitePolicy:
    """What follows a skipped step: ``abort``, ``skip`` (go on) or ``rollback``, at most ``budget`` times in a run."""

    name: str
    budget: int
    lr_factor: float  # rollback: factor on the learning rate
    run_dir: Path
    distributed: Distributed

    def answer(self, step: int, origins: list[dict[str, Any]], count: int, lr_factor: float) -> str:
        """Write the report of ``step`` and return a message for the user if the run may go on.

        Args:
            step: the update, counted from 0, that was not made.
            origins: of this rank, from `TrainStep.trace`.
            count: how many such steps the run has had, with this one.
            lr_factor: the factor on the learning rate so far.

        Raises:
            UserError: the policy is abort, or the budget is used up.
            RollBack: the policy is rollback.
        """
        ranks = self.distributed.gather_objects(origins)
        replay = f"moa-train resume={self.run_dir} replay={step}"
        report = {"step": step, "count": count, "policy": self.name, "ranks": ranks, "replay": replay}
        path = self.run_dir / f"nonfinite-step-{step:08d}.json"
        self.distributed.on_main(lambda: write_whole(path, json.dumps(report, indent=1) + "\n"))
        culprits = [(rank, micro) for rank, micros in enumerate(ranks) for micro in micros if micro["origin"]]
        first = "not seen again when the step was repeated; suspect the hardware"
        if culprits:
            rank, micro = culprits[0]
            first = f"first in {micro['origin']}, micro-batch {micro['micro']} (rank {rank})"
        message = f"The gradient of step {step} is not finite: {first}. The update was not made. Samples: {path}."
        if self.name == "abort" or count > self.budget:
            used = f" It was number {count}; engine.nonfinite_budget={self.budget}." if self.name != "abort" else ""
            raise UserError(
                f"{message}{used}\nTo look into it: {replay}\nTo go on from the last checkpoint: moa-train resume="
                f"{self.run_dir} with a lower optim.lr, runtime.precision=fp32 or engine.nonfinite=skip or rollback."
            )
        if self.name == "rollback":
            factor = lr_factor * self.lr_factor
            raise RollBack(f"{message} Rolling back; learning rate x {factor:g}.", count, factor)
        return f"{message} Skipped, {count} of at most {self.budget}."


@dataclass
class Origin:
    """Where the first number that is not finite arose in a forward and backward pass."""

    name: str | None = None
    rows: list[int] = field(default_factory=list)  # of the logits, that are not finite

    def note(self, name: str, value: object) -> None:
        """Take ``name`` if nothing came before it and ``value`` is a tensor that is not finite."""
        if self.name is None and isinstance(value, Tensor) and not value.isfinite().all():
            self.name = name


@contextmanager
def tracing(model: nn.Module) -> Iterator[Origin]:
    """Watch the parameters of ``model``, its input and the outputs of its modules, in the order of computation."""
    origin = Origin()
    for name, parameter in model.named_parameters():
        origin.note(f"parameter {name}", parameter)
    hooks = [model.register_forward_pre_hook(lambda module, inputs: origin.note("the input", inputs[0]))]
    for name, module in model.named_modules():
        hooks.append(
            module.register_forward_hook(
                lambda module, inputs, output, name=name: origin.note(f"module {name or 'model'}", output)
            )
        )
    try:
        yield origin
    finally:
        for hook in hooks:
            hook.remove()


def trace_gradient(origin: Origin, model: nn.Module, loss: Tensor) -> None:
    """Go on backward: the last parameter, in the model's order, whose gradient is not finite comes first."""
    origin.note("the loss", loss)
    if origin.name is not None:
        return
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Not backward(): DDP's hooks must not see these gradients.
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    for (name, _), gradient in zip(reversed(named), reversed(gradients), strict=True):
        origin.note(f"gradient of {name}", gradient)
