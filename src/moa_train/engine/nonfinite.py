"""NaN and infinity: detected before they reach the weights, on every rank alike, and traced to their origin."""

import json
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa_train.optim.optimizers import Optimizers
from moa_train.runtime.device import copies_overlap
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole
from moa_train.runtime.precision import Precision


class RollBack(Exception):  # noqa: N818 a request, not an error
    """Request to rebuild the run from its last checkpoint.

    Attributes:
        nonfinite: number of non-finite gradients so far; the number in the checkpoint is lower.
        lr_factor: factor on the learning rate from the checkpoint on.
    """

    def __init__(self, message: str, nonfinite: int, lr_factor: float) -> None:
        super().__init__(message)
        self.nonfinite, self.lr_factor = nonfinite, lr_factor


class GradientGuard:
    """Skips updates whose gradient is not finite, and reports them afterward.

    The norm of the reduced gradient is the same on every rank, and so are all decisions that depend on it. The host
    reads the norm right away if that costs nothing (on a CPU, or with fp16, whose scaler waits for the device anyway)
    or if an optimizer cannot skip an update by itself. Otherwise the fused kernels skip (``found_inf``), and the host,
    which must not wait for the device, learns of it ``delay`` steps later, on every rank after the same step.

    Attributes:
        found: 1 on the device if the optimizers are to skip the current update, else 0; None if the host decides.
    """

    def __init__(self, optimizer: Optimizers, precision: Precision, delay: int | None = None) -> None:
        self.optimizer, self.scaler = optimizer, precision.scaler
        skips = all(getattr(part, "_step_supports_amp_scaling", False) for part in optimizer.parts)
        if delay is None:
            delay = 2 if precision.device.type == "cuda" and skips and not self.scaler.is_enabled() else 0
        self.delay = delay
        self.found: Tensor | None = None
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def admits(self, step: int, grad_norm: Tensor) -> bool:
        """Return whether to run the optimizers in update ``step``; with `found`, they may still skip it themselves."""
        # The host always reads the first one: fused SGD that skips it leaves its momentum uninitialized (torch 2.15).
        if self.delay and all(part.state for part in self.optimizer.parts):
            self.found = (~grad_norm.isfinite()).float()
            for part in self.optimizer.parts:
                part.found_inf = self.found  # type: ignore[attr-defined]
            host, copied = self.found.to("cpu", non_blocking=copies_overlap(self.found.device)), None
            if self.found.is_cuda:
                copied = torch.cuda.Event(blocking=True)  # waiting for it leaves the core to others
                copied.record()
            self._pending.append((step, host, copied))
            return True
        self.found = None
        if math.isfinite(grad_norm):
            return True
        # If the scale is above 1, it may have caused the overflow. The scaler then halves it, and nothing is reported.
        if not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            self._pending.append((step, torch.ones(()), None))
        return False

    def caught(self, wait: bool = False) -> Iterator[int]:
        """Yield the skipped steps that were not reported yet; ``wait`` includes those still on the device."""
        while self._pending and (wait or self._pending[0][2] is None or len(self._pending) > self.delay):
            step, found, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()  # usually done, because the copy was started ``delay`` steps ago
            if found:
                yield step


@dataclass
class NonFinitePolicy:
    """What happens after a skipped step: see ``engine.nonfinite``.

    Attributes:
        name: ``abort``, ``skip`` or ``rollback``.
        budget: number of skipped steps after which the run aborts in any case.
        lr_factor: factor on the learning rate for each rollback.
        resume: command that resumes the run.
    """

    name: str
    budget: int
    lr_factor: float
    run_dir: Path
    distributed: Distributed
    resume: str

    def answer(
        self, step: int, origins: list[dict[str, Any]], count: int, lr_factor: float, *, saved: bool, late: bool
    ) -> str:
        """Write the report on ``step``, and return a message for the user if the run may continue.

        Args:
            step: number of the skipped update, from 0.
            origins: what `TrainStep.trace` returned on this rank.
            count: number of such steps in this run, including this one.
            lr_factor: current factor on the learning rate.
            saved: whether there is a checkpoint.
            late: whether ``origins`` are from a repetition with later weights.

        Raises:
            UserError: the policy is abort, or the budget is exceeded.
            RollBack: the policy is rollback.
        """
        ranks = self.distributed.gather_objects(origins)
        replay = f"{self.resume} replay={step}"
        report = {
            "step": step,
            "count": count,
            "policy": self.name,
            "ranks": ranks,
            "replay": replay if saved else None,
        }
        path = self.run_dir / f"nonfinite-step-{step:08d}.json"
        self.distributed.on_main(lambda: write_whole(path, json.dumps(report, indent=1) + "\n"))
        culprits = [(rank, micro) for rank, micros in enumerate(ranks) for micro in micros if micro["origin"]]
        first = "it was finite when the step was repeated, which suggests a hardware fault"
        if late:
            first = "it was finite when the step was repeated with the weights of a later step"
        if culprits:
            rank, micro = culprits[0]
            first = f"the first such value is in {micro['origin']}, micro-batch {micro['micro']} (rank {rank})"
        message = f"The gradient of step {step} is not finite: {first}. The update was not applied. Samples: {path}."
        if self.name == "abort" or count > self.budget:
            used = ""
            if self.name != "abort":
                used = f" This is number {count}, which exceeds engine.nonfinite_budget={self.budget}."
            remedies = "a lower optim.lr, runtime.precision=fp32 or engine.nonfinite=skip or rollback"
            if not saved:
                raise UserError(
                    f"{message}{used}\nThere is no checkpoint yet. Start again with {remedies}. To be able to "
                    f"investigate the step with replay={step}, save more often (engine.save_every)."
                )
            raise UserError(
                f"{message}{used}\nTo investigate: {replay}\nTo continue from the last checkpoint: "
                f"{self.resume} with {remedies}."
            )
        if self.name == "rollback":
            factor = lr_factor * self.lr_factor
            raise RollBack(f"{message} Rolling back; learning rate x {factor:g}.", count, factor)
        return f"{message} Skipped: number {count} of at most {self.budget}."


@dataclass
class Origin:
    """Name of the first tensor with NaN or infinity in a forward and backward pass, or None."""

    name: str | None = None

    def note(self, name: str, value: object) -> None:
        """Take ``name`` if ``value`` is the first tensor that is not finite."""
        if self.name is None and isinstance(value, Tensor) and not value.isfinite().all():
            self.name = name


@contextmanager
def tracing(model: nn.Module) -> Iterator[Origin]:
    """Check the parameters of ``model``, its input and the outputs of its modules, in the order of computation."""
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
    """Check the loss and then the gradients, from the last parameter to the first, as the backward pass does."""
    origin.note("the loss", loss)
    if origin.name is not None:
        return
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Not backward(): DDP's hooks must not see these gradients.
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    for (name, _), gradient in zip(reversed(named), reversed(gradients), strict=True):
        origin.note(f"gradient of {name}", gradient)
