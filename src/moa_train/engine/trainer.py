"""The loop. It trains any module on any batches; everything it needs is built elsewhere and handed in."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.evaluate import Evaluation
from moa_train.engine.metrics import better
from moa_train.engine.nonfinite import NonFinitePolicy
from moa_train.engine.plan import Plan
from moa_train.engine.state import TrainState
from moa_train.engine.step import TrainStep
from moa_train.interfaces import Batch, Metric
from moa_train.optim.schedule import Schedule
from moa_train.runtime.device import peak_memory
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.signals import StopSignals
from moa_train.tracking.meters import Speed
from moa_train.tracking.tracker import Tracker


@dataclass
class Trainer:
    """Drives a run from ``state.step`` to the end of its plan.

    Attributes:
        train_batches: returns this rank's micro-batches from a step on.
        evaluate: evaluates the current weights on ``eval_split``, or is None if no split chooses the best checkpoint.
            It returns None if a stop was requested meanwhile.
        metrics: the metrics that ``evaluate`` computes; ``best_by`` names the one that chooses the best checkpoint.
        record: what every checkpoint holds in addition to the state: configuration, classes, fingerprint (JSON).
        metadata: what every weights file holds in its header.
    """

    state: TrainState
    plan: Plan
    schedule: Schedule
    train_step: TrainStep
    train_batches: Callable[[int], Iterator[Batch]]
    evaluate: Callable[[], Evaluation | None] | None
    eval_split: str
    metrics: Mapping[str, Metric]
    best_by: str
    batch_size: int
    store: CheckpointStore
    tracker: Tracker
    nonfinite: NonFinitePolicy
    stop: StopSignals
    distributed: Distributed
    record: dict[str, Any]
    metadata: dict[str, str]
    speed: Speed = field(default_factory=Speed)
    stopping: bool = False
    saved_step: int = 0

    def fit(self) -> bool:
        """Train to the end of the plan, or until a stop is asked for; tell which: True is the end.

        Raises:
            RollBack: the run is to be built anew from its last checkpoint.
        """
        state, plan = self.state, self.plan
        self.stop.watched, self.saved_step = True, state.step
        with self.store:
            self._make_up_for_evaluation()
            batches = self.train_batches(state.step)
            while state.step < plan.stop_step and not self.stopping:
                lr = self._set_lr(state.step)
                values = self.train_step(batches, state.step, self._asked_to_stop)
                if values is None:
                    self._stop_in_front_of_step()
                    break
                state.meters.add(values)
                state.step += 1
                self._answer_nonfinite()
                self.tracker.advance(state.step)
                self.speed.tick(self.batch_size)
                if plan.log.due(state.step) or state.step == plan.total_steps:
                    self._log(lr)  # the only place where the host waits for the device
                self.store.poll()  # a background save that failed ends the run here
                self.stopping = self._asked_to_stop()
                is_best = self._evaluate_if_due()
                if self.stopping or is_best or plan.saves(state.step):
                    self._save(is_best)
        self.distributed.barrier()  # rank 0 has written its last checkpoint: all may read it
        return not self.stopping

    def replay(self, step: int) -> list[dict[str, Any]]:
        """Repeat the updates up to ``step``, trace that one instead of making it, and return what every rank found.

        Nothing is evaluated, logged or saved.
        """
        batches = self.train_batches(self.state.step)
        while self.state.step < step:
            self._set_lr(self.state.step)
            self.train_step(batches, self.state.step)
            self.state.step += 1
        return self.distributed.gather_objects(self.train_step.trace(batches, step))

    def _asked_to_stop(self) -> bool:
        return self.distributed.agree_any(self.stop.requested)

    def _stop_in_front_of_step(self) -> None:
        """Save the state before a step that was given up half-way, unless the last step has done so."""
        self.stopping = True
        self._set_lr(self.state.step - 1)
        if self.saved_step != self.state.step or self.state.step == 0:
            self._save(is_best=False)

    def _set_lr(self, step: int) -> float:
        lr = self.schedule.lr(step) * self.state.lr_factor
        self.state.optimizer.set_lr(lr)
        return lr

    def _answer_nonfinite(self, wait: bool = False) -> None:
        """Deal with steps whose gradient was not finite: the same ones on every rank."""
        for step in self.train_step.guard.caught(wait):
            self.state.nonfinite += 1
            origins = self.train_step.trace(self.train_batches(step), step)
            self.tracker.say(self.nonfinite.answer(step, origins, self.state.nonfinite, self.state.lr_factor))

    def _log(self, lr: float) -> None:
        step, epoch = self.state.step, float(self.state.step / self.plan.steps_per_epoch)
        means = self.state.meters.read()
        means["loss"] = self.distributed.mean(means["loss"])
        row = {"epoch": epoch, **means, "lr": lr, "images_per_second": self.speed.rate}
        self.tracker.log_step(step, {**row, "memory": peak_memory(self.distributed.device)})

    def _evaluate_if_due(self) -> bool:
        """Evaluate where it is time to; tell whether the result is the best so far."""
        state, plan = self.state, self.plan
        due = state.step > 0 and (plan.evaluate.due(state.step) or state.step == plan.total_steps)
        if self.evaluate is None or self.stopping or not due or state.evaluated_step == state.step:
            return False
        result = self.evaluate()
        self.speed.restart()
        if result is None:
            self.stopping = True
            return False
        value, before = result.values[self.best_by], state.best.get(self.best_by)
        is_best = math.isfinite(value) and (before is None or better(self.metrics[self.best_by])(value, before))
        if is_best:
            state.best = {"step": state.step, **result.as_dict()}
        state.evaluated_step = state.step
        epoch = float(state.step / plan.steps_per_epoch)
        self.tracker.log_eval(state.step, {"epoch": epoch, **result.as_dict(), "best": is_best}, self.eval_split)
        return is_best

    def _make_up_for_evaluation(self) -> None:
        """Do what a stop had interrupted, and save that it is done."""
        before = self.state.evaluated_step
        self._set_lr(self.state.step - 1)  # it is saved, too: that of the last update
        is_best = self._evaluate_if_due()
        if self.state.evaluated_step != before:
            self._save(is_best)

    def _score(self) -> float:
        """Return what checkpoints are compared by: the metric of the best one, where higher is better."""
        value: float = self.state.best[self.best_by]
        return value if self.metrics[self.best_by].higher_is_better else -value

    def _save(self, is_best: bool) -> None:
        self._answer_nonfinite(wait=True)  # what is saved says how many there were
        self.saved_step = self.state.step
        meters = self.distributed.gather_objects(self.state.meters.state_dict())
        if self.distributed.is_main:
            state = {**self.record, "train": {**self.state.scalars(), "meters": meters}}
            score = self._score() if is_best else None
            self.store.save(
                self.state.step, self.state.tensors(), state, metadata=self.metadata, score=score, background=True
            )
        self.speed.restart()
