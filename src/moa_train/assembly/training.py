"""Build the training state (weights, optimizer, EMA) and the step that updates it."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from moa_train.assembly.inputs import build_train_transform
from moa_train.data.source import Source
from moa_train.engine.distillation import Teachers
from moa_train.engine.find_weights import find_weights
from moa_train.engine.state import TrainState
from moa_train.engine.step import TrainStep
from moa_train.knobs import knobs
from moa_train.model.compiling import compile_model, compiles, has_blocks
from moa_train.model.load import Loaded, load_weights
from moa_train.model.pth_file import read_state_dict
from moa_train.model.registry import create_model
from moa_train.optim.clip import clip_gradients
from moa_train.optim.ema import AveragedWeights
from moa_train.optim.optimizers import create_optimizer
from moa_train.plugins import LOSSES
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.runtime.seed import seed_everything
from moa_train.schema import RunConfig, compile_mode, image_shape
from moa_train.serialization import from_dict

log = logging.getLogger(__name__)


def build_state(
    config: RunConfig,
    num_classes: int,
    lr: float,
    precision: Precision,
    *,
    fresh: bool,
    classes: Sequence[str] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> TrainState:
    """Return the state before the first step, on the device of ``precision``.

    A ``fresh`` state has the weights from ``config.init``, or the pretrained weights that the model's own settings
    name, if any. Otherwise, the weights are random, and a checkpoint overwrites them. ``classes`` are their names, with
    which those of ``config.init`` are compared. ``say`` is told what was changed to make these weights fit.
    """
    seed_everything(config.runtime.seed)
    model = create_model(config.model, image_size=image_shape(config.data.image_size), num_classes=num_classes)
    model = model.to(precision.device)
    if config.runtime.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if fresh and config.init:
        say(f"Weights of {config.init}: {load_init(model, Path(config.init), config, classes)}.")
    elif fresh:
        model.load_pretrained()
    decay = config.engine.ema_decay
    optimizer = create_optimizer(config.optim, model, lr)
    return TrainState(model, optimizer, precision, AveragedWeights(model, decay) if decay else None)


def check_classes(path: Path, known: Sequence[str] | None, classes: Sequence[str]) -> None:
    """Check that the weights in ``path`` classify the classes of the training images, in their order.

    Raises:
        UserError: they do not. Weights that do not record their classes, None, pass.
    """
    if known is None or list(known) == list(classes):
        return
    first = next((name for name, other in zip(classes, known, strict=False) if name != other), "the last one")
    raise UserError(
        f"init={path}: the weights have {len(known)} classes, the training images {len(classes)}, and the first "
        f"difference is {first!r}. Give init_head=new to reinitialize the classifier, or rename the class folders to "
        "match."
    )


def load_init(model: nn.Module, path: Path, config: RunConfig, classes: Sequence[str] | None = None) -> Loaded:
    """Load the weights that a run starts from, and return what was changed.

    Raises:
        UserError: they do not fit the model. The message lists the settings of their own model, if the file has them.
    """
    if path.is_file() and path.suffix in (".pth", ".pt"):  # for example torchvision's weights
        weights, metadata = read_state_dict(path), dict[str, str]()
        # torchvision renames these itself; its published ViTs have the old names.
        new = {"linear_1": "0", "linear_2": "3"}
        weights = {
            re.sub(r"\.mlp\.(linear_[12])\.", lambda found: f".mlp.{new[found[1]]}.", name): value
            for name, value in weights.items()
        }
    else:
        weights, metadata = find_weights(path).load()
    theirs: RunConfig | None = from_dict(json.loads(metadata["config"])) if "config" in metadata else None
    grid = None
    if theirs is not None:
        height, width = image_shape(theirs.data.image_size)
        grid = height // theirs.model.patch_size, width // theirs.model.patch_size
    if config.init_head == "strict" and classes is not None and metadata.get("named") != "false":
        check_classes(path, json.loads(metadata.get("classes", "null")), classes)
    try:
        return load_weights(model, weights, head=config.init_head, grid=grid)
    except UserError as error:
        if theirs is None:
            raise
        ours = {key: value for key, _, value in knobs(config.model)}
        other = [
            f"model.{key}={str(value).replace(' ', '')}"
            for key, item, value in knobs(theirs.model)
            if item.metadata["fixed"] and value != ours[key]
        ]
        raise UserError(f"{error}\nThe weights' own model has {' '.join(other)}." if other else str(error)) from error


def build_compiled(config: RunConfig, model: nn.Module, total_steps: int, device: torch.device) -> nn.Module:
    """Return the model that the training step calls: compiled if the run requests it or is long enough to benefit.

    Compiling takes between ten seconds and a minute; in a long run on a GPU, the faster steps save far more than that.
    """
    mode = compile_mode(config.runtime.compile)
    if mode == "auto":
        long = total_steps >= 2000 and not config.runtime.deterministic
        mode = "blocks" if device.type == "cuda" and has_blocks(model) and long else "false"
        if mode == "blocks" and not compiles(device):
            log.warning(
                "torch.compile does not work here: it requires Triton, a C compiler and Python's headers. "
                "The model runs uncompiled, which is slower."
            )
            mode = "false"
    return model if mode == "false" else compile_model(model, mode, config.runtime.compile_for)


def build_train_step(
    config: RunConfig,
    source: Source,
    state: TrainState,
    *,
    weak_from: int,
    total_steps: int,
    distributed: Distributed,
    teachers: Teachers | None,
) -> TrainStep:
    """Return the function that updates ``state`` by one step; from step ``weak_from`` on, augmentation is weak."""
    engine, loss = config.engine, config.loss
    return TrainStep(
        build_compiled(config, state.model, total_steps, distributed.device),
        state.optimizer,
        transform=build_train_transform(config, source, weak_from, teachers),
        loss=partial(LOSSES.load(loss.name), **LOSSES.args(loss.name, loss.args, "loss.args")),
        clip=partial(clip_gradients, config=config.optim),
        precision=state.precision,
        ema=state.ema,
        micro_batches=engine.batch_size // (engine.micro_batch_size or engine.batch_size) // distributed.world_size,
        batch_size=engine.batch_size,
        seed=config.runtime.seed,
        distributed=distributed,
        # CUDA graphs reuse the memory of the update before. No tensor of compiled code is used after its update.
        begin=(lambda: None) if config.runtime.compile_for == "default" else torch.compiler.cudagraph_mark_step_begin,
    )
