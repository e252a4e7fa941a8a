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


def test_the_first_trials_are_never_pruned(make, tmp_path):
    """Optuna's halving would prune the third of these trials, whose scores fall from trial to trial."""
    search = make(pruner="halving", startup=3)
    pruned = []
    for number in range(4):
        trial = search.study.ask(fixed_distributions=search.space)
        rows = [{"kind": "eval", "step": step, "best": True, "top1": 90.0 - 20 * number} for step in (1, 2, 4, 8)]
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
