"""The parts of a search; tests/cli/test_sweep.py runs, kills and continues complete ones."""

import json
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from moa_train.runs.folder import SweepFolder
from moa_train.runs.search import Search
from moa_train.schema import RunConfig

SPACE = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True, "step": None}}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Search]:
    def made(*, metric: str = "top1", **sweep: object) -> Search:
        config = RunConfig()
        config.engine.metrics, config.engine.best_by = [metric], metric.rpartition(":")[2]
        for key, value in sweep.items():
            setattr(config.sweep, key, value)
        return Search(SweepFolder(tmp_path), config, SPACE, [])

    return made


def test_the_direction_is_that_of_an_own_metric(make):
    assert make(metric="moa_train.engine.metrics:Loss").study.direction.name == "MINIMIZE"


def write(run_dir: Path, top1: dict[int, float | None]) -> None:
    """Write the evaluations of a run, by step."""
    run_dir.mkdir(exist_ok=True)
    rows = [{"kind": "eval", "step": step, "best": False, "top1": value} for step, value in top1.items()]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_trials_of_different_batch_sizes_are_compared_at_the_same_evaluation(make, tmp_path):
    """A trial of batch size 512 evaluates at step 391 for the fourth time, one of batch size 128 for the first time."""
    search = make(pruner="median", startup=1)
    first, second = (search.study.ask(fixed_distributions=search.space) for _ in range(2))
    write(tmp_path / "512", {98: 10.0, 196: 20.0, 293: 30.0, 391: 40.0})
    assert not search._pruning(first, set())(tmp_path / "512")
    search.study.tell(first, 40.0)
    prune = search._pruning(second, set())
    steps = {391: 11.0, 782: None, 1172: 31.0}
    for count in (1, 2, 3):
        write(tmp_path / "128", dict(list(steps.items())[:count]))
        assert not prune(tmp_path / "128"), f"better than the other trial at evaluation {count}"
    assert search.study.trials[1].intermediate_values == {1: 11.0, 3: 31.0}
    write(tmp_path / "128", steps | {1563: 39.0})
    assert prune(tmp_path / "128")


def test_the_first_trials_are_never_pruned(make, tmp_path):
    """Optuna's halving would prune the third of these trials, whose scores fall from trial to trial."""
    search = make(pruner="halving", startup=3)
    pruned = []
    for number in range(4):
        trial = search.study.ask(fixed_distributions=search.space)
        write(tmp_path / str(number), dict.fromkeys((1, 2, 3, 4), 90.0 - 20 * number))
        prune = search._pruning(trial, set())
        pruned.append((prune(tmp_path / str(number)), trial.should_prune()))
        search.study.tell(trial, 90.0 - 20 * number)
    assert [ours for ours, _ in pruned] == [False, False, False, True]
    assert pruned[2][1], "the pruner itself would have"


def test_the_best_trial_is_named_after_the_folder_of_its_run(make):
    search = make()
    params = {"optim.lr": 1e-3}
    pruned = optuna.trial.create_trial(
        params=params, distributions=search.space, state=optuna.trial.TrialState.PRUNED, value=1.0
    )
    search.study.add_trial(pruned)
    search.study.add_trial(
        optuna.trial.create_trial(params=params, distributions=search.space, value=90.0, user_attrs={"continues": 0})
    )
    assert search.best() == "trial-0001: optim.lr=0.001 (top1 90)"
