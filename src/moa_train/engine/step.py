"""One optimizer update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moa_train.engine.loss import soft_cross_entropy
from moa_train.optim.ema import AveragedWeights
from moa_train.optim.optimizers import Optimizers
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.runtime.seed import reseed


class TrainStep:
    """Accumulate, autocast, scale, clip, step, average.

    The gradient is that of the mean loss over the global batch, whatever the number of ranks and micro-batches: every
    micro-batch adds the *sum* of its losses over the global batch size, ranks synchronise once, at the last one, and
    the result is clipped once. Randomness of the model depends on (seed, step, micro-batch) alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        *,
        transform: Callable[[Any, int], tuple[Tensor, Tensor]],
        clip: Callable[[Sequence[Tensor]], Tensor],
        precision: Precision,
        ema: AveragedWeights | None,
        micro_batches: int,
        batch_size: int,
        seed: int,
        distributed: Distributed,
    ) -> None:
        self.model = distributed.wrap(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer
        self.transform = transform
        self.clip = clip
        self.precision = precision
        self.ema = ema
        self.micro_batches = micro_batches
        self.loss_scale = distributed.world_size / batch_size  # DDP averages over the ranks
        self.seed = seed
        self.distributed = distributed
        self.on_inputs: Callable[[Tensor], None] | None = None

    def __call__(self, batches: Iterator[Any], step: int) -> dict[str, Tensor]:
        """Run update number ``step`` (from 0) on this rank's next micro-batches.

        Returns:
            Scalars that are still on the device: ``loss``, in nats, whose mean over the ranks is that of the global
            batch, and ``grad_norm``, of the global batch, before clipping.
        """
        total = torch.zeros((), device=self.distributed.device)
        for number in range(self.micro_batches):
            batch = next(batches).to(self.distributed.device, non_blocking=True)
            assert batch.step == step, f"the loader delivered step {batch.step} at step {step}"
            images, targets = self.transform(batch, step)
            if self.on_inputs:
                self.on_inputs(images)
                self.on_inputs = None
            reseed(self.distributed.device, self.seed, "model", step, batch.micro)
            last = number == self.micro_batches - 1
            with nullcontext() if last else self.distributed.no_sync(self.model):
                with self.precision.autocast():
                    logits = self.model(images)
                loss = soft_cross_entropy(logits, targets) * self.loss_scale
                self.precision.scaler.scale(loss).backward()
            total += loss.detach()
        return {"loss": total, "grad_norm": self._update()}

    def _update(self) -> Tensor:
        scaler = self.precision.scaler
        whole: Any = self.optimizer  # all parts as one: either all of them skip a step or none
        scaler.unscale_(whole)
        grad_norm = self.clip(self.parameters)
        scaler.step(whole)
        scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()
        return grad_norm
