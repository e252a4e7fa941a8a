"""The training loop. It trains any `Classifier` on any batches; `assembly` builds its parts."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.evaluator import Evaluation, FailedEvaluationError
from moa_train.engine.nonfinite import NonFinitePolicy
from moa_train.engine.plan import Plan
from moa_train.engine.prefetch import Prefetcher
from moa_train.engine.state import TrainState
from moa_train.engine.step import TrainStep
from moa_train.interfaces import Batch
from moa_train.optim.schedule import Schedule
from moa_train.runtime.device import peak_memory
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.signals import StopSignals
from moa_train.runtime.threads import AdaptiveThreads
from moa_train.tracking.meters import Speed
from moa_train.tracking.tracker import Tracker


@dataclass
class Trainer:
    """Trains from ``state.step`` to the end of the plan.

    Attributes:
        train_batches: returns this rank's micro-batches, beginning with those of the given step.
        evaluate: evaluates the current weights on ``eval_split``, or is None if no split chooses the best checkpoint.
            It returns None if a stop was requested meanwhile.
        best_by: name of the metric that chooses the best checkpoint.
        higher_is_better: whether the best checkpoint is the one with the highest value of that metric.
        batch_size: number of samples per update, over all ranks and micro-batches.
        record: JSON that every checkpoint holds in addition to the state: configuration, classes, fingerprint, origin.
        metadata: header of every weights file.
        stopping: whether a stop was requested.
        saved_step: step of the newest checkpoint.
    """

    state: TrainState
    plan: Plan
    schedule: Schedule
    train_step: TrainStep
    train_batches: Callable[[int], Iterator[Batch]]
    evaluate: Callable[[], Evaluation | None] | None
    eval_split: str
    best_by: str
    higher_is_better: bool
    batch_size: int
    store: CheckpointStore
    tracker: Tracker
    nonfinite: NonFinitePolicy
    stop: StopSignals
    distributed: Distributed
    record: dict[str, Any]
    metadata: dict[str, str]
    threads: AdaptiveThreads = field(default_factory=AdaptiveThreads)
    speed: Speed = field(default_factory=Speed)
    stopping: bool = False
    saved_step: int = 0
    rolled_back: bool = False

    def fit(self) -> bool:
        """Train until the plan ends or a stop is requested, and return whether the plan has ended.

        Raises:
            RollBack: the caller must rebuild the run from its last checkpoint and call `fit` again.
        """
        state, plan = self.state, self.plan
        self.stop.watched, self.saved_step = True, state.step
        self.distributed.before_leaving = self.store.close
        with self.store:
            self._catch_up_on_evaluation()
            if self.rolled_back:  # a resume must not return to the old learning rate
                self.save(is_best=state.best.get("step") == state.step)
            batches = Prefetcher(self.train_batches(state.step), self.distributed.device)
            while state.step < plan.stop_step and not self.stopping:
                lr = self._set_lr(state.step)
                values = self.train_step(batches, state.step, self._stop_requested)
                if values is None:
                    self._stop_before_step()
                    break
                state.meters.add(values)
                state.step += 1
                if state.step < plan.stop_step:
                    batches.ahead()
                self._handle_nonfinite()
                self.tracker.advance(state.step)
                self.speed.tick(self.batch_size)
                self.threads.tick(self.batch_size)
                if plan.log.due(state.step) or state.step == plan.total_steps:
                    self._log(lr)  # the host waits for the device here, and not in other steps
                self.store.poll()  # raises if a background save has failed
                self.stopping = self._stop_requested()
                is_best = self._evaluate_if_due()
                if self.stopping or is_best or plan.saves(state.step):
                    self.save(is_best)
        self.distributed.barrier()  # from here on, every rank may read the last checkpoint
        return not self.stopping

    def replay(self, step: int) -> list[dict[str, Any]]:
        """Repeat the updates before ``step``, trace update ``step`` without applying it, and return all ranks' traces.

        Nothing is evaluated, logged or saved.
        """
        batches = self.train_batches(self.state.step)
        while self.state.step < step:
            self._set_lr(self.state.step)
            self.train_step(batches, self.state.step)
            self.state.step += 1
        return self.distributed.gather_objects(self.train_step.trace(batches, step))

    def _stop_requested(self) -> bool:
        return self.distributed.agree_any(self.stop.requested)

    def _stop_before_step(self) -> None:
        """Save the state before a step that was abandoned halfway, unless it is saved already."""
        self.stopping = True
        self._set_lr(self.state.step - 1)
        if self.saved_step != self.state.step or self.state.step == 0:
            self.save(is_best=False)

    def _set_lr(self, step: int) -> float:
        lr = self.schedule.lr(step) * self.state.lr_factor
        self.state.optimizer.set_lr(lr)
        return lr

    def _handle_nonfinite(self, wait: bool = False) -> None:
        """Report steps that were skipped because of a non-finite gradient; they are the same on every rank."""
        for step in self.train_step.guard.caught(wait):
            self.state.nonfinite += 1
            origins = self.train_step.trace(self.train_batches(step), step)
            saved, late = self.saved_step > 0, step < self.state.step - 1
            count, factor = self.state.nonfinite, self.state.lr_factor
            self.tracker.say(self.nonfinite.answer(step, origins, count, factor, saved=saved, late=late))

    def _log(self, lr: float) -> None:
        step, epoch = self.state.step, float(self.state.step / self.plan.steps_per_epoch)
        means = self.state.meters.read()
        means["loss"] = self.distributed.mean(means["loss"])
        row = {"epoch": epoch, **means, "lr": lr, "images_per_second": self.speed.rate}
        self.tracker.log_step(step, {**row, "memory": peak_memory(self.distributed.device)})

    def _evaluate_if_due(self) -> bool:
        """Evaluate if an evaluation is due, and return whether its result is the best so far."""
        state, plan = self.state, self.plan
        due = state.step > 0 and (plan.evaluate.due(state.step) or state.step == plan.total_steps)
        if self.evaluate is None or self.stopping or not due or state.evaluated_step == state.step:
            return False
        try:
            result = self.evaluate()
        except FailedEvaluationError:  # must not cost the updates before it
            if self.saved_step != state.step:
                self.save()
            raise
        self.speed.restart()
        if result is None:
            self.stopping = True
            return False
        value, best = result.values[self.best_by], state.best.get(self.best_by)
        is_best = math.isfinite(value) and (best is None or self._score(value) > self._score(best))
        if is_best:
            state.best = {"step": state.step, **result.as_dict()}
        state.evaluated_step = state.step
        epoch = float(state.step / plan.steps_per_epoch)
        self.tracker.log_eval(state.step, {"epoch": epoch, **result.as_dict(), "best": is_best}, self.eval_split)
        return is_best

    def _catch_up_on_evaluation(self) -> None:
        """Run an evaluation that a stop had interrupted, and save the result."""
        before = self.state.evaluated_step
        self._set_lr(self.state.step - 1)  # checkpoints hold the learning rate of the last update
        is_best = self._evaluate_if_due()
        if self.state.evaluated_step != before:
            self.save(is_best)

    def _score(self, value: float) -> float:
        """Return a value of the ``best_by`` metric in the form that checkpoints are ranked by: higher is better."""
        return value if self.higher_is_better else -value

    def save(self, is_best: bool = False) -> None:
        """Start to save a checkpoint in the background."""
        self._handle_nonfinite(wait=True)  # before their number is saved
        self.saved_step = self.state.step
        meters = self.distributed.gather_objects(self.state.meters.state_dict())
        if self.distributed.is_main:
            state = {**self.record, "train": {**self.state.scalars(), "meters": meters}}
            state |= {"kept": True} if self.plan.keep.due(self.state.step) else {}
            score = self._score(self.state.best[self.best_by]) if is_best else None
            self.store.save(
                self.state.step, self.state.tensors(), state, metadata=self.metadata, score=score, background=True
            )
        self.speed.restart()
        self.threads.restart()
