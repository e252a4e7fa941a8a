"""Search settings with Optuna, through its ask-and-tell interface. The journal of the study is a file of the sweep."""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import IO, TYPE_CHECKING, Any

from moa_train.engine.metrics import create_metrics
from moa_train.plugins import short_name
from moa_train.runs.folder import Job, SweepFolder, is_finished, scores
from moa_train.runs.jobs import Runner
from moa_train.runs.read import SEED
from moa_train.runtime.errors import UserError
from moa_train.runtime.libraries import require
from moa_train.schema import RunConfig

if TYPE_CHECKING:
    import optuna

JOURNAL = "trials.jsonl"


class Search:
    """A study whose trials are runs.

    Suggestions depend only on ``runtime.seed``, the trial's number and the results so far. So a search that was
    interrupted proposes the same trials as one that was not.
    """

    def __init__(
        self, folder: SweepFolder, config: RunConfig, space: Mapping[str, Mapping[str, Any]], seeds: Sequence[str]
    ) -> None:
        """Open or create the study.

        Args:
            folder: of the sweep.
            config: of a run; its section ``sweep`` describes the search.
            space: by key, either ``{"choices": [...]}`` or ``{"low": x, "high": y, "log": bool, "step": None | z}``.
            seeds: values of runtime.seed that every trial is run with; empty for the configured one.
        """
        optuna = import_optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.folder, self.config, self.settings, self.seeds = folder, config, config.sweep, list(seeds)
        self.metric, self._crashed = short_name(config.engine.best_by), set[int]()
        higher = create_metrics(config.engine)[self.metric].higher_is_better
        self.space = {key: _distribution(options) for key, options in space.items()}
        path = str(folder.path / JOURNAL)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(path, lock_obj=_FileLock(path))),  # type: ignore[arg-type]
            study_name="sweep",
            direction="maximize" if higher else "minimize",
            pruner=self._pruner(),
            load_if_exists=True,
        )

    def run(self, runner: Runner) -> None:
        """Run trials until the requested number is reached, first those that were interrupted."""
        self._add_continued(runner)
        while runner.stop is None:
            with ExitStack() as held:
                with self._choosing():
                    trial = self._interrupted(held) or self._ask(held)
                if trial is None:
                    return
                self._run(trial, runner)

    def best(self) -> str | None:
        """Describe the best trial, or return None if none is complete."""
        try:
            trial = self.study.best_trial
        except ValueError:
            return None
        number = trial.user_attrs.get("continues", trial.number)  # the folder of a pruned and resumed trial
        return f"{_name(number)}: {' '.join(_overrides(trial.params))} ({self.metric} {trial.value:.4g})"

    def _ask(self, held: ExitStack) -> "optuna.Trial | None":
        number = sum("continues" not in trial.user_attrs for trial in self.study.trials)
        if number >= self.settings.trials:
            return None
        self.study.sampler = self._sampler(len(self.study.trials))
        trial = self.study.ask(fixed_distributions=self.space)
        held.enter_context(self._hold(trial.number))
        return trial

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        """Let one process at a time choose a trial. A new trial is running before its parameters and lock exist."""
        lock = _FileLock(str(self.folder.path / "choosing"))
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _interrupted(self, held: ExitStack) -> "optuna.Trial | None":
        """Return a trial that an earlier process has started and not completed."""
        import optuna

        for frozen in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            if frozen.number in self._crashed or not held.enter_context(self._hold(frozen.number)):
                continue
            if frozen.params.keys() == self.space.keys():
                return optuna.Trial(self.study, frozen._trial_id)
            self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)  # killed before it was complete
        return None

    def _run(self, trial: "optuna.Trial", runner: Runner) -> None:
        import optuna

        state, jobs = optuna.trial.TrialState, self._jobs(trial.number, trial.params)
        reported = set(self.study.trials[trial.number].intermediate_values)
        for number, job in enumerate(jobs):
            # All trials are compared by their first seed, so that the pruner compares like with like.
            prune = self._pruning(trial, reported) if number == 0 else lambda run_dir: False
            place = f"trial {trial.number + 1}" + (f", seed {number + 1} of {len(jobs)}" if len(jobs) > 1 else "")
            if not runner.run(job, place, prune):
                if runner.outcomes[job.name] == "pruned":
                    self.study.tell(trial, state=state.PRUNED)
                elif runner.stop is None:
                    self._crashed.add(trial.number)  # stays a running trial, which the next start of the search repeats
                return
        value = self._value(jobs)
        self.study.tell(trial, value, state=state.FAIL if value is None else state.COMPLETE)

    def _value(self, jobs: Sequence[Job]) -> float | None:
        """Return the mean of the best validation results of finished runs, or None if one was never finite."""
        values = [result_value(self.folder.run_dir(job.name), self.metric) for job in jobs]
        finite = [value for value in values if value is not None]
        return fmean(finite) if len(finite) == len(values) else None

    def _pruning(self, trial: "optuna.Trial", reported: set[int]) -> Callable[[Path], bool]:
        # Trials are compared by the number of the evaluation, because a step is not as far in a trial of another batch
        # size: Optuna's "step" is that number.
        def prune(run_dir: Path) -> bool:
            new = [(number, value) for number, value in scores(run_dir, self.metric) if number not in reported]
            for number, value in new:
                reported.add(number)
                trial.report(value, step=number)
            return bool(new) and trial.number >= self.settings.startup and trial.should_prune()

        return prune

    def _jobs(self, number: int, params: Mapping[str, Any]) -> list[Job]:
        overrides = _overrides(params)
        if not self.seeds:
            return [Job(_name(number), overrides)]
        return [Job(f"{_name(number)}_seed-{seed}", [*overrides, f"{SEED}={seed}"]) for seed in self.seeds]

    def _hold(self, number: int) -> AbstractContextManager[bool]:
        return self.folder.hold(_name(number), [job.name for job in self._jobs(number, {})])

    def _add_continued(self, runner: Runner) -> None:
        """Add the results of pruned trials whose first seed was resumed to its end, and run their other seeds."""
        import optuna

        known = {trial.user_attrs.get("continues") for trial in self.study.trials}
        for trial in self.study.get_trials(states=(optuna.trial.TrialState.PRUNED,)):
            jobs = self._jobs(trial.number, trial.params)
            if trial.number in known or not is_finished(self.folder.run_dir(jobs[0].name)):
                continue
            with self._hold(trial.number) as free:
                place = f"trial {trial.number + 1}, which was pruned and resumed"
                if not free or not all(runner.stop is None and runner.run(job, place) for job in jobs):
                    continue
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=trial.params,
                    distributions=trial.distributions,
                    value=self._value(jobs),
                    user_attrs={"continues": trial.number},
                )
            )

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        from optuna.samplers import RandomSampler, TPESampler

        seed = (self.config.runtime.seed * 1_000_003 + number) % 2**32
        if self.settings.sampler == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=self.settings.startup, multivariate=False)

    def _pruner(self) -> "optuna.pruners.BasePruner":
        from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

        if self.settings.pruner == "median":
            return MedianPruner(n_startup_trials=self.settings.startup)
        if self.settings.pruner == "halving":
            return SuccessiveHalvingPruner()
        return NopPruner()


def result_value(run_dir: Path, metric: str) -> float | None:
    """Return the best value of a metric on the split that chooses the best checkpoint of a finished run.

    Raises:
        UserError: the run has no such split.
    """
    result = json.loads((run_dir / "result.json").read_text())
    split = result["measured"]["split"]
    if split == "none":
        raise UserError(
            f"{run_dir} has no validation split, which a search needs to compare trials. Hold out validation images "
            "with data.val_fraction=0.1."
        )
    return result.get(split, {}).get(metric)


def import_optuna() -> Any:
    """Import Optuna.

    Raises:
        UserError: it is not installed.
    """
    require("sweep.trials", ["optuna"], "sweep")
    import optuna

    return optuna


def _name(number: int) -> str:
    return f"trial-{number + 1:04}"


def _overrides(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]


def _distribution(options: Mapping[str, Any]) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "choices" in options:
        return CategoricalDistribution(options["choices"])
    low, high, log, step = (options[name] for name in ("low", "high", "log", "step"))
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(low, high, log=log, step=step)


class _FileLock:
    """Locks the journal with a kernel lock, which a killed process releases. Those of Optuna outlive it."""

    def __init__(self, path: str) -> None:
        self._path = Path(f"{path}.lock")
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
