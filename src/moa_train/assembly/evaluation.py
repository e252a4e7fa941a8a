"""Evaluate a model on a split, and the state of a run on the split that selects the best checkpoint."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, TextIO

from torch import Tensor, nn

from moa_train.assembly.inputs import build_eval_loader
from moa_train.assembly.pictures import show_mistakes
from moa_train.assembly.views import Views
from moa_train.data.augment import Normalize
from moa_train.data.source import Source
from moa_train.engine.evaluator import Evaluation, evaluate
from moa_train.engine.metrics import create_metrics
from moa_train.engine.mistakes import MistakesRecorder
from moa_train.engine.state import TrainState
from moa_train.interfaces import Batch
from moa_train.plugins import short_name
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.runtime.threads import AdaptiveThreads
from moa_train.schema import RunConfig
from moa_train.tracking.console import EvaluationProgress
from moa_train.tracking.tracker import Tracker


def build_evaluation(
    config: RunConfig,
    source: Source,
    distributed: Distributed,
    stop: Callable[[], bool] = lambda: False,
    stream: TextIO | None = None,
    record: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
    views: Views | None = None,
    threads: AdaptiveThreads | None = None,
) -> Callable[[nn.Module], Evaluation | None]:
    """Return a function that evaluates a model on ``source``; its result is None if ``stop`` requested a stop.

    Rank 0 shows the progress on ``stream`` (default: standard output). ``record`` receives the logits of every batch.
    ``views`` averages over views of each image (default: only the center crop). ``threads`` counts the batches.
    """
    views = views or Views.plan("none", config, source)
    title, style = f"evaluating {source.describe()['name']}", config.tracking.progress
    progress = EvaluationProgress(title, style=style, stream=stream) if distributed.is_main else lambda done, of: None
    precision = Precision.resolve(config.runtime.eval_precision, distributed.device)

    def advance(done: int, rounds: int) -> None:
        progress(done, rounds)
        if threads is not None:
            threads.tick(1)

    run = partial(
        evaluate,
        batches=build_eval_loader(views.config, views.source, distributed, stop),
        transform=views.transform,
        metrics=create_metrics(config.engine),
        autocast=precision.evaluation,
        distributed=distributed,
        stop=stop,
        advance=advance,
        record=record,
    )

    def evaluation(model: nn.Module) -> Evaluation | None:
        with threads.doing("evaluation") if threads is not None else nullcontext():
            return run(views.wrap(model))

    return evaluation


def measurement(config: RunConfig, split: str, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Return what a score depends on in addition to the weights, in JSON types.

    Scores are comparable only if their measurements are equal.
    """
    engine = config.engine
    mean, std = Normalize.statistics(config.data)
    return {
        "split": split,
        "images": sources[split].fingerprint if split in sources else None,
        "metric": engine.best_by,
        "metric_args": engine.args.get(short_name(engine.best_by), {}),
        "weights": "ema" if engine.ema_decay else "model",
        "eval_crop": config.data.eval_crop,
        "mean": list(mean),
        "std": list(std),
        "eval_precision": config.runtime.eval_precision,
    }


def build_validation(
    config: RunConfig,
    source: Source,
    state: TrainState,
    distributed: Distributed,
    stop: Callable[[], bool],
    tracker: Tracker,
    threads: AdaptiveThreads,
) -> Callable[[], Evaluation | None]:
    """Return a function that evaluates the state of a run, with the EMA weights if there are any.

    Loggers, if there are any, show the confusion matrix and the most confident mistakes.
    """
    build = partial(build_evaluation, config, source, distributed, stop, threads=threads)
    build()  # raises errors before the training starts
    shown = config.tracking.mistakes if config.tracking.loggers else 0

    def validation() -> Evaluation | None:
        distributed.broadcast_buffers(state.model)  # batch normalization statistics differ between ranks
        recorder = MistakesRecorder(shown)
        with state.ema.applied() if state.ema is not None else nullcontext():
            result = build(record=recorder)(state.model) if shown else build()(state.model)
        if shown and result is not None:
            found = recorder.gather(distributed)
            if distributed.is_main:
                show_mistakes(config, source, found, state.step, tracker)
        return result

    return validation
