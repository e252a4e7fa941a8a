"""One optimizer update."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moa_train.engine.nonfinite import GradientGuard, trace_gradient, tracing
from moa_train.engine.ratios import UpdateRatios
from moa_train.interfaces import Batch
from moa_train.optim.ema import AveragedWeights
from moa_train.optim.optimizers import Optimizers
from moa_train.runtime import faults
from moa_train.runtime.device import copies_overlap, has_float64
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.runtime.seed import reseed
from moa_train.runtime.signals import StopRequestedError


class TrainStep:
    """One update: forward and backward passes, clipping, optimizer step, EMA. Skipped if the gradient is not finite.

    The gradient is that of the mean loss over the global batch for any number of ranks and micro-batches: every
    micro-batch contributes the *sum* of its losses divided by the global batch size, the ranks synchronize once, in
    the last backward pass, and the result is clipped once. Randomness in the model depends on (seed, step, micro-batch)
    only.

    Args:
        model: bare or compiled, on its final device.
        transform: from a batch on the device and the step to images (B, C, H, W) and target distributions (B, K).
        loss: from logits and targets, both (B, K), to the sum of the losses.
        clip: clips gradients in place and returns their norm before clipping.
        micro_batches: number of micro-batches per update on this rank.
        batch_size: number of samples per update, over all ranks and micro-batches.
        begin: called at the beginning of each update.

    Attributes:
        on_inputs: called once with the next images that the model sees and their targets, then reset.
        ratios: measures gradients and updates by layer, if it is set.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        *,
        transform: Callable[[Batch, int], tuple[Tensor, Tensor]],
        loss: Callable[[Tensor, Tensor], Tensor],
        clip: Callable[[Sequence[Tensor]], Tensor],
        precision: Precision,
        ema: AveragedWeights | None,
        micro_batches: int,
        batch_size: int,
        seed: int,
        distributed: Distributed,
        begin: Callable[[], object] = lambda: None,
    ) -> None:
        self.begin = begin
        self.bare: nn.Module = getattr(model, "_orig_mod", model)  # without the wrapper of torch.compile
        self.model = distributed.wrap(model)
        self.guard = GradientGuard(optimizer, precision)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.statistics = Statistics(model)
        self.optimizer = optimizer
        self.transform = transform
        self.loss = loss
        self.clip = clip
        self.precision = precision
        self.ema = ema
        self.micro_batches = micro_batches
        self.loss_scale = distributed.world_size / batch_size  # because DDP averages over the ranks
        self.seed = seed
        self.distributed = distributed
        self.on_inputs: Callable[[Tensor, Tensor], None] | None = None
        self.ratios: UpdateRatios | None = None

    def __call__(
        self, batches: Iterator[Batch], step: int, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Tensor] | None:
        """Run update number ``step`` (from 0) on this rank's next micro-batches.

        Args:
            batches: this rank's micro-batches.
            step: number of the update.
            stop: called between micro-batches, with the same result on all ranks. If it returns True, the update is
                abandoned without a trace.

        Returns:
            Scalars on the device: ``loss``, in nats, whose mean over the ranks is the loss of the global batch,
            ``grad_norm``, the norm of the global gradient before clipping, and the values of ``ratios``. None if the
            update was abandoned.

        Raises:
            StopRequestedError: a stop was requested while this rank waited for a batch. The other ranks already
                wait for its gradient.
        """
        self.begin()
        self.statistics.save()
        total = torch.zeros((), device=self.distributed.device)
        for number in range(self.micro_batches):
            if number and stop():
                self._abandon()
                return None
            try:
                batch = next(batches)
            except StopRequestedError:
                if self.distributed.world_size > 1:
                    raise
                self._abandon()
                return None
            assert batch.step == step, f"the loader delivered step {batch.step} at step {step}"
            last = number == self.micro_batches - 1
            with nullcontext() if last else self.distributed.no_sync(self.model):
                loss, _ = self._loss(self.model, batch, step)
                self.precision.scaler.scale(loss).backward()
            total += loss.detach()
        grad_norm = self._update(step)
        return {"loss": total, "grad_norm": grad_norm, **(self.ratios.values if self.ratios else {})}

    def _abandon(self) -> None:
        self.optimizer.zero_grad()
        self.statistics.restore()

    def _loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Return the contribution of a micro-batch to the loss of the global batch, and its logits."""
        device = self.distributed.device
        if has_float64(device):
            batch = batch.to(device, non_blocking=copies_overlap(device))
        images, targets = (tensor.to(device) for tensor in self.transform(batch, step))
        if self.on_inputs:
            self.on_inputs(images, targets)
            self.on_inputs = None
        if faults.point("step.input"):
            images = images.log()
        reseed(self.distributed.device, self.seed, "model", step, batch.micro)
        with self.precision.autocast():
            logits = model(images)
        loss = self.loss(logits, targets) * self.loss_scale
        if faults.point("step.loss"):
            loss = loss * math.nan
        if faults.point("step.gradient"):
            loss.register_hook(lambda gradient: gradient * math.inf)
        # The factor is 1, or NaN if the loss is not finite. Then the gradient is NaN too, which all ranks notice.
        return loss * (1 + 0 * loss.detach()), logits

    def _update(self, step: int) -> Tensor:
        """Apply the gradient and return its norm."""
        scaler = self.precision.scaler
        whole: Any = self.optimizer  # so that the scaler lets either all optimizers step or none
        scaler.unscale_(whole)
        if self.ratios:
            self.ratios.before(step)
        grad_norm = self.clip(self.parameters)
        admitted = self.guard.admits(step, grad_norm)
        skipped = self.guard.found
        if admitted:
            scaler.step(whole)
            if self.ema is not None:
                self.ema.update(skipped)
        if skipped is not None or not admitted:
            self.statistics.restore(skipped)
        scaler.update()
        if self.ratios:
            self.ratios.after()
        self.optimizer.zero_grad()
        return grad_norm

    def trace(self, batches: Iterator[Batch], step: int) -> list[dict[str, Any]]:
        """Repeat the forward and backward passes of update ``step``, and report what is not finite. Changes nothing.

        Returns:
            For each micro-batch of this rank: its number, its samples (epoch and index), the samples whose logits are
            not finite, and the ``origin``, which is the first parameter, module or gradient that is not finite, or
            None.
        """
        found = []
        self.statistics.save()
        for _ in range(self.micro_batches):
            batch = next(batches)
            # Compiled blocks would run without the hooks of the modules inside them.
            with tracing(self.bare) as origin, torch.compiler.set_stance("force_eager"):
                loss, logits = self._loss(self.bare, batch, step)
            trace_gradient(origin, self.bare, loss)
            bad = (~logits.isfinite()).any(dim=1).cpu()
            samples = {"epoch": batch.epoch.tolist(), "index": batch.index.tolist(), "bad": batch.index[bad].tolist()}
            found.append({"micro": batch.micro, "origin": origin.name, **samples})
        self.statistics.restore()
        return found


class Statistics:
    """The buffers of a model's batch normalization, saved before an update and restored if it is not made.

    They are copied together, in a few kernels instead of one for each of the hundreds of buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers: dict[torch.dtype, list[Tensor]] = {}
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                for buffer in part.buffers(recurse=False):
                    self.buffers.setdefault(buffer.dtype, []).append(buffer)
        self.saved: dict[torch.dtype, Tensor] = {}

    def save(self) -> None:
        """Remember the current values."""
        self.saved = {dtype: self._flat(dtype) for dtype in self.buffers}

    def restore(self, condition: Tensor | None = None) -> None:
        """Put the saved values back, if ``condition`` is given only if it is not 0 on the device."""
        for dtype, buffers in self.buffers.items():
            values = self.saved[dtype]
            if condition is not None:
                values = torch.where(condition.bool(), values, self._flat(dtype))
            pieces = values.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [piece.view_as(buf) for piece, buf in zip(pieces, buffers, strict=True)])

    def _flat(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([buffer.reshape(-1) for buffer in self.buffers[dtype]])
