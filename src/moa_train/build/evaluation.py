"""Evaluation of a model on a split, and of a state on what chooses the best checkpoint."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TextIO

from torch import nn

from moa_train.build.data import build_eval_loader, build_eval_transform
from moa_train.data import Source
from moa_train.engine.evaluate import Evaluation, evaluate
from moa_train.engine.state import TrainState
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.schema import RunConfig
from moa_train.tracking.console import EvaluationProgress


def build_evaluation(
    config: RunConfig,
    source: Source,
    distributed: Distributed,
    stop: Callable[[], bool] = lambda: False,
    stream: TextIO | None = None,
) -> Callable[[nn.Module], Evaluation | None]:
    """Return a function that evaluates a model on ``source``; its result is None where ``stop`` asked to stop.

    Rank 0 shows on ``stream`` (standard output, unless given) how far it is.
    """
    title, style = f"evaluating {source.describe()['name']}", config.tracking.progress
    progress = EvaluationProgress(title, style=style, stream=stream) if distributed.is_main else lambda done, of: None
    precision = Precision.resolve(config.runtime.eval_precision, distributed.device)
    return partial(
        evaluate,
        batches=build_eval_loader(config, source, distributed),
        transform=build_eval_transform(config),
        autocast=precision.autocast,
        distributed=distributed,
        stop=stop,
        advance=progress,
    )


def build_validation(
    config: RunConfig, source: Source, state: TrainState, distributed: Distributed, stop: Callable[[], bool]
) -> Callable[[], Evaluation | None]:
    """Return a function that evaluates the state of a run: the averaged weights where there are any."""
    evaluation = build_evaluation(config, source, distributed, stop)

    def validation() -> Evaluation | None:
        distributed.broadcast_buffers(state.model)  # batch normalisation's statistics differ from rank to rank
        with state.ema.applied() if state.ema is not None else nullcontext():
            return evaluation(state.model)

    return validation
