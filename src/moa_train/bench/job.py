"""What a call of `moa-bench` is to measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moa_train.runtime.distributed import Distributed
from moa_train.schema import RunConfig


@dataclass(frozen=True)
class Job:
    """A configuration, and how it is to be measured. Several values of a sequence mean one case each.

    Attributes:
        config: what is measured: model, data, optimizer, precision, ... as `moa-train` would run it.
        overrides: the arguments it was composed from, as `moa-train` takes them.
        compose: composes another configuration from such arguments.
        num_classes: of the configured data.
        device: from ``config.runtime.device``.
        rounds: how often each contender has its turn.
        seconds: least length of one turn of a step, a stage, a save.
        steps: length of one turn of a whole training.
        modes: of ``train`` and ``infer``.
        batches: images of a forward pass; none: the configured micro-batch.
        precisions: names as in `runtime.precision`; none: the configured one.
        compiles: whether torch.compile is on.
        checkpointings: whether activations are recomputed in the backward pass.
        against: peers: ``timm`` or ``torchvision`` for input; ``timm/NAME``, ``torchvision/NAME`` and
            ``moa-train/OPTION`` for step, with arguments after a colon.
        ranks: number of processes.
    """

    config: RunConfig
    overrides: Sequence[str]
    compose: Callable[[Sequence[str]], RunConfig]
    num_classes: int
    device: torch.device
    rounds: int = 7
    seconds: float = 0.5
    steps: int = 100
    modes: Sequence[str] = ("train", "infer")
    batches: Sequence[int] = ()
    precisions: Sequence[str] = ()
    compiles: Sequence[bool] = (False,)
    checkpointings: Sequence[bool] = (False,)
    against: Sequence[str] = ()
    ranks: int = 2

    @property
    def alone(self) -> Distributed:
        """This process, as the only one."""
        return Distributed(0, 0, 1, 1, self.device)
