"""What training changes (weights, optimizer, averages), and the step that changes it."""

from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from moa_train.build.data import build_train_transform
from moa_train.build.model import build_model
from moa_train.data import Source
from moa_train.engine.state import TrainState
from moa_train.engine.step import TrainStep
from moa_train.engine.weights import find_weights
from moa_train.model.weights import load_weights
from moa_train.optim import AveragedWeights, clip_gradients, create_optimizer
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.runtime.seed import seed_everything
from moa_train.schema import RunConfig


def build_state(config: RunConfig, num_classes: int, rate: float, precision: Precision, init: str | None) -> TrainState:
    """Return the state before the first step, on the device of ``precision``: random weights, or those in ``init``."""
    seed_everything(config.runtime.seed)
    model = build_model(config.model, config.data, num_classes).to(precision.device)
    if config.runtime.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if init:
        load_weights(model, find_weights(Path(init)).load()[0], head=config.init_head)
    optim, decay = config.optim, config.engine.ema_decay
    optimizer = create_optimizer(
        optim.name,
        model,
        lr=rate,
        weight_decay=optim.weight_decay,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        momentum=optim.momentum,
    )
    return TrainState(model, optimizer, precision, AveragedWeights(model, decay) if decay else None)


def build_train_step(
    config: RunConfig, source: Source, state: TrainState, off_step: int, distributed: Distributed
) -> TrainStep:
    """Return what makes one update of ``state``; from step ``off_step`` on, strong augmentation is off."""
    engine, optim = config.engine, config.optim
    return TrainStep(
        cast(nn.Module, torch.compile(state.model)) if config.runtime.compile else state.model,
        state.optimizer,
        transform=build_train_transform(config, source, off_step),
        clip=partial(clip_gradients, mode=optim.clip, limit=optim.clip_value),
        precision=state.precision,
        ema=state.ema,
        micro_batches=engine.batch_size // (engine.micro_batch_size or engine.batch_size) // distributed.world_size,
        batch_size=engine.batch_size,
        seed=config.runtime.seed,
        distributed=distributed,
    )
