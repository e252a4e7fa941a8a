"""Evaluation of a model on a split, and of a run's state on the split that chooses the best checkpoint."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TextIO

from torch import nn

from moa_train.assembly.inputs import build_eval_loader, build_eval_transform
from moa_train.data.source import Source
from moa_train.engine.evaluate import Evaluation, evaluate
from moa_train.engine.metrics import create_metrics
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
    """Return a function that evaluates a model on ``source``; its result is None if ``stop`` requested a stop.

    Rank 0 shows the progress on ``stream`` (default: standard output).
    """
    title, style = f"evaluating {source.describe()['name']}", config.tracking.progress
    progress = EvaluationProgress(title, style=style, stream=stream) if distributed.is_main else lambda done, of: None
    precision = Precision.resolve(config.runtime.eval_precision, distributed.device)
    return partial(
        evaluate,
        batches=build_eval_loader(config, source, distributed),
        transform=build_eval_transform(config),
        metrics=create_metrics(config.engine),
        autocast=precision.evaluation,
        distributed=distributed,
        stop=stop,
        advance=progress,
    )


def build_validation(
    config: RunConfig, source: Source, state: TrainState, distributed: Distributed, stop: Callable[[], bool]
) -> Callable[[], Evaluation | None]:
    """Return a function that evaluates the state of a run, with the EMA weights if there are any."""
    evaluation = build_evaluation(config, source, distributed, stop)

    def validation() -> Evaluation | None:
        distributed.broadcast_buffers(state.model)  # the statistics of batch normalization differ between ranks
        with state.ema.applied() if state.ema is not None else nullcontext():
            return evaluation(state.model)

    return validation
