"""What training changes (weights, optimizer, averages), and the step that changes it."""

import json
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
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.runtime.seed import seed_everything
from moa_train.schema import RunConfig, from_dict, knobs


def build_state(config: RunConfig, num_classes: int, rate: float, precision: Precision, init: str | None) -> TrainState:
    """Return the state before the first step, on the device of ``precision``: random weights, or those in ``init``."""
    seed_everything(config.runtime.seed)
    model = build_model(config.model, config.data, num_classes).to(precision.device)
    if config.runtime.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if init:
        load_init(model, Path(init), config)
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


def load_init(model: nn.Module, path: Path, config: RunConfig) -> None:
    """Load the weights that a run starts from.

    Raises:
        UserError: they do not fit; with the settings of their own model, where they know them.
    """
    weights, metadata = find_weights(path).load()
    try:
        load_weights(model, weights, head=config.init_head)
    except UserError as error:
        if "config" not in metadata:
            raise
        theirs: RunConfig = from_dict(json.loads(metadata["config"]))
        ours = {key: value for key, _, value in knobs(config.model)}
        other = [
            f"model.{key}={str(value).replace(' ', '')}"
            for key, item, value in knobs(theirs.model)
            if item.metadata["fixed"] and value != ours[key]
        ]
        raise UserError(f"{error}\nTheir own model has {' '.join(other)}." if other else str(error)) from error


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
