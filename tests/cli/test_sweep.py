"""Sweeps with real processes: they continue after a kill, a crash ends one run only, and a search can be resumed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from moa_train.cli import sweep as parsing
from moa_train.runs.folder import SweepFolder, status
from moa_train.runs.search import Search
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig
from moa_train.tracking.jsonl import read_rows

TINY = (
    "schedule.duration=4 steps", "schedule.warmup=0", "tracking=quiet", "runtime.device=cpu", "data.limit=64",
    "data.val_fraction=0.1", "engine.batch_size=16", "engine.eval_every=2 steps", "engine.save_every=1 steps",
    "engine.keep_last=100",  # a step that a test waits for is not removed
    "model.embed_dim=16", "model.depths=[1,1]", "model.heads=[1,2]", "model.window=4", "model.moa.reduction=8",
)  # fmt: skip
COMMAND = (sys.executable, "-m", "moa_train.cli.train")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def sweep(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, "-m", *arguments], cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)


def interrupt(number: int, *arguments: str, cwd: Path, when: Path) -> tuple[int, str]:
    """Start a sweep, send a signal to all its processes once a file exists, and return exit code and output."""
    process = subprocess.Popen(
        [*COMMAND, "-m", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not when.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.fixture(scope="module", autouse=True)
def _schema() -> None:
    ConfigStore.instance().store(name="train_schema", node=RunConfig)
    ConfigStore.instance().store(group="hydra/help", name="train_help", node={})


def starts(run_dir: Path) -> list[int]:
    return [start["first_step"] for start in json.loads((run_dir / "provenance.json").read_text())]


def test_an_invalid_value_in_any_run_prevents_the_sweep(tmp_path):
    done = sweep(*TINY, "optim.lr=1e-4,-1,2e-2", cwd=tmp_path)
    assert done.returncode == 2
    assert "optim.lr=-1.0 is out of range" in done.stderr
    assert "No run of the sweep was started" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr=1e-3,2e-3", "run_dir=one"], "a sweep sets run_dir itself"),
        (["optim.lr=1e-3,2e-3", "resume=auto"], "a sweep sets resume itself"),
        (["optim.lr=1e-3,2e-3", "sweep.trials=1,2"], "have one value"),
        (["optim.lr=interval(1e-4,1e-2)"], "Set sweep.trials=N to search it"),
        (["optim.lr=1e-3", "sweep.trials=2"], "needs a search space"),
        (["optim.lr=1e-3,1e-2", "runtime.seed=interval(0,1)", "sweep.trials=2"], "List them: runtime.seed=0,1,2"),
        (["optim.lr=interval(-1,1)", "sweep.trials=2"], "optim.lr=-1.0 is out of range"),
        (["optim.lr=interval(1e-2,1e-4)", "sweep.trials=2"], "the lower bound exceeds the upper bound"),
        (["optim.weight_decay=tag(log,interval(0,0.1))", "sweep.trials=2"], "log requires bounds above 0"),
        (["model=glob(moa*)"], "a sweep takes no patterns. List the options: model=A,B"),
        (["model=glob(moa*)", "sweep.trials=2"], "a sweep takes no patterns"),
        (["optim.lr=interval(1e-4,1e-2)", "sweep.trials=2", "data.val_fraction=0"], "compares trials on validation"),
        (["optim.lr=1e-3", "sweep.sampler=grid"], "Options: tpe, random"),
        (["engine.batch_size=16,17", "engine.micro_batch_size=16"], r"is in the run engine\.batch_size=17\."),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        parsing.run([*TINY, *arguments], "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("search", [[], ["sweep.trials=2"]])
def test_a_setting_that_every_run_needs_can_be_swept(search):
    config, _, swept = parsing.check([*TINY, *search, "data=folder", "data.root=a,b"], "train")
    assert (config.data.root, config.sweep.trials) == ("a", len(search) * 2)
    assert [override.key_or_group for override in swept] == ["data.root"]


def test_an_error_of_all_runs_is_not_attributed_to_one(tmp_path):
    with pytest.raises(UserError, match=r"^engine\.batch_size=16 .*engine\.micro_batch_size=3") as error:
        parsing.check([*TINY, "engine.micro_batch_size=3", "optim.lr=1,2"], "train")
    assert "in the run" not in str(error.value)


def test_only_a_sweep_that_exists_can_be_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no sweep in nowhere to continue"):
        parsing.run(["-m", "sweep.dir=nowhere"], "train")


def test_what_may_change_when_a_sweep_is_continued():
    grid, search = ["data=digits", "optim.lr=1,2"], ["data=digits", "optim.lr=interval(1,2)", "sweep.trials=3"]
    place = Path("all")
    assert parsing._continued(["sweep.dir=all"], grid, place) == grid
    assert parsing._continued(["sweep.dir=all", "sweep.trials=9"], search, place) == [*search[:2], "sweep.trials=9"]
    assert parsing._continued(["data=digits", "optim.lr=1,2,3"], grid, place) == ["data=digits", "optim.lr=1,2,3"]
    for other in (
        ["optim.lr=1,2", "runtime.seed=0,1"],
        ["runtime.seed=0,1"],
        [],
    ):  # would rename the folders of all runs
        with pytest.raises(UserError, match="was started with other arguments"):
            parsing._continued(["data=digits", *other], grid, place)
    with pytest.raises(UserError, match=r"  - optim\.lr=interval\(1,2\)\n  \+ optim\.lr=interval\(1,3\)"):
        parsing._continued(["data=digits", "optim.lr=interval(1,3)", "sweep.trials=3"], search, place)


def test_the_search_space():
    texts = [
        "optim.lr=tag(log,interval(1e-4,1))", "model.window=int(interval(4,16))", "model.moa.overlap=range(0,4)",
        "model.dropout=range(0.1,0.5,0.2)", "data=choice(digits,cifar10)", "runtime.seed=3,4",
    ]  # fmt: skip
    space, seeds = parsing._space(OverridesParser.create().parse_overrides(texts))
    assert seeds == ["3", "4"]
    assert space == {
        "optim.lr": {"low": 1e-4, "high": 1.0, "log": True, "step": None},
        "model.window": {"low": 4, "high": 16, "log": False, "step": None},
        "model.moa.overlap": {"low": 0, "high": 3, "log": False, "step": 1},
        "model.dropout": {"low": 0.1, "high": pytest.approx(0.3), "log": False, "step": 0.2},
        "data": {"choices": ["digits", "cifar10"]},
    }


def test_a_sweep_refuses_torchrun_and_a_single_run_refuses_settings_of_sweeps(monkeypatch, tiny):
    with pytest.raises(UserError, match="require -m"):
        parsing.refuse_sweep_settings(tiny({"sweep.trials": 3}))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"sweep\.ranks=N"):
        parsing.run(["optim.lr=1,2"], "train")


def test_a_killed_sweep_continues_where_it_was(tmp_path):
    grid = [*TINY, "sweep.dir=all", "schedule.duration=12 steps", "runtime.seed=0,1,2"]
    first, second, third = (tmp_path / "all" / f"seed-{seed}" for seed in (0, 1, 2))
    code, _ = interrupt(signal.SIGKILL, *grid, cwd=tmp_path, when=second / "checkpoints" / "step-00000003")
    assert code == -signal.SIGKILL
    while status(second) == "running":  # the kernel closes the pipe of a killed process before it releases its lock
        time.sleep(0.01)
    assert [status(run) for run in (first, second, third)] == ["finished", "stopped", "waiting"]
    before = (first / "result.json").stat().st_mtime_ns
    done = sweep("sweep.dir=all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before") == 1
    assert (first / "result.json").stat().st_mtime_ns == before
    assert [len(starts(run)) for run in (first, second, third)] == [1, 2, 1]
    assert starts(second)[1] >= 2
    for run in (first, second, third):
        assert [row["step"] for row in read_rows(run / "metrics.jsonl") if row.get("split") == "val"] == [
            2, 4, 6, 8, 10, 12,
        ]  # fmt: skip
        assert json.loads((run / "result.json").read_text())["step"] <= 12
    refused = sweep(*grid, "optim.weight_decay=0.3", cwd=tmp_path)
    assert refused.returncode == 2
    assert "  + optim.weight_decay=0.3" in refused.stderr
    assert "  - " not in refused.stderr


def test_ctrl_c_stops_the_sweep_after_saving(tmp_path):
    grid = [*TINY, "sweep.dir=all", "schedule.duration=500 steps", "optim.lr=1e-3,2e-3"]
    run = tmp_path / "all" / "lr-0.001"
    code, output = interrupt(signal.SIGINT, *grid, cwd=tmp_path, when=run / "checkpoints" / "step-00000002")
    assert code == 75, output
    assert "Stopped at step" in output
    assert output.rstrip().endswith("To continue the sweep: moa-train -m sweep.dir=all")
    assert not (tmp_path / "all" / "lr-0.002").exists()
    assert status(run) == "stopped"


def test_a_crash_ends_one_run_only(tmp_path):
    (tmp_path / "crash.py").write_text(
        "import os, signal\n\ndef now(logits, targets):\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    done = sweep(*TINY, "sweep.dir=all", "loss.name=crash:now,cross_entropy", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 2 runs are not finished:\n  failed with exit code -11" in done.stderr
    assert status(tmp_path / "all" / "name-crash-now") == "failed"
    assert status(tmp_path / "all" / "name-cross_entropy") == "finished"


def test_two_processes_share_a_sweep(tmp_path):
    grid = [*TINY, "sweep.dir=all", "schedule.duration=12 steps", "optim.lr=1e-3,2e-3,3e-3"]
    pair = [
        subprocess.Popen([*COMMAND, "-m", *grid], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    runs = sorted((tmp_path / "all").glob("lr-*"))
    assert [len(starts(run)) for run in runs] == [1, 1, 1]
    assert "runs in another process" in "".join(outputs)


SPACE = ("optim.lr=tag(log,interval(1e-4,1e-2))", "model.dropout=0.0,0.1", "engine.ema_decay=range(0.5,0.9,0.2)")


def trials(folder: Path) -> list[tuple[str, float | None, dict[str, object]]]:
    from optuna import load_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = load_study(study_name="sweep", storage=JournalStorage(JournalFileBackend(str(folder / "trials.jsonl"))))
    return [(trial.state.name, trial.value, trial.params) for trial in study.trials]


def test_a_killed_search_proposes_the_same_trials(tmp_path):
    """Both seeds of a trial count, and finished ones are not run again."""
    search = [*TINY, *SPACE, "sweep.trials=2", "sweep.startup=1", "runtime.seed=0,1", "runtime.deterministic=true"]
    checkpoint = tmp_path / "killed" / "trial-0001_seed-1" / "checkpoints" / "step-00000001"
    interrupt(signal.SIGKILL, *search, "sweep.dir=killed", cwd=tmp_path, when=checkpoint)
    done = sweep("sweep.dir=killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best trial: trial-000" in done.stdout
    assert [state for state, _, _ in trials(tmp_path / "killed")] == ["COMPLETE"] * 2
    config, _, swept = parsing.check(search, "train")
    (tmp_path / "straight").mkdir()
    straight = Search(SweepFolder(tmp_path / "straight"), config, *parsing._space(swept))
    for _, value, params in trials(tmp_path / "killed"):  # what the same search proposes without being killed
        with contextlib.ExitStack() as held:
            trial = straight._ask(held)
        assert trial.params == params
        straight.study.tell(trial, value)
    assert starts(tmp_path / "killed" / "trial-0001_seed-0") == [0]
    assert len(starts(tmp_path / "killed" / "trial-0001_seed-1")) == 2
    values = [
        json.loads((tmp_path / "killed" / f"trial-0002_seed-{seed}" / "result.json").read_text())["val"]["top1"]
        for seed in (0, 1)
    ]
    assert trials(tmp_path / "killed")[1][1] == pytest.approx(sum(values) / 2)


def test_pruned_trials_stop_early_and_can_be_resumed(tmp_path):
    """The first trial is too good to be true, so that the second one is pruned at its first evaluation."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    (tmp_path / "all").mkdir()
    backend = JournalFileBackend(str(tmp_path / "all" / "trials.jsonl"))
    study = optuna.create_study(storage=JournalStorage(backend), study_name="sweep", direction="maximize")
    study.add_trial(
        optuna.trial.create_trial(
            params={"optim.lr": 1e-3},
            distributions={"optim.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)},
            value=100.0,
            intermediate_values=dict.fromkeys(range(1, 200), 100.0),
        )
    )
    search = [*TINY, SPACE[0], "sweep.dir=all", "sweep.trials=2", "sweep.startup=1", "schedule.duration=300 steps"]
    done = sweep(*search, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "all" / "trial-0002"
    assert status(run) == "pruned"
    assert "  pruned                   trial-0002" in done.stderr
    assert [state for state, _, _ in trials(tmp_path / "all")] == ["COMPLETE", "PRUNED"]
    resume = [*COMMAND, f"resume={run}", "schedule.duration=60 steps"]
    subprocess.run(resume, cwd=tmp_path, check=True, capture_output=True, env=ENVIRONMENT)
    assert status(run) == "finished"
    assert sweep("sweep.dir=all", cwd=tmp_path).returncode == 0
    found = trials(tmp_path / "all")
    assert [state for state, _, _ in found] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert found[2][1] == json.loads((run / "result.json").read_text())["val"]["top1"]
    assert found[2][2] == found[1][2]


def test_two_processes_share_a_search(tmp_path):
    """They start at the same time, when a new trial exists before its parameters and its lock."""
    search = [*TINY, *SPACE, "sweep.trials=3", "sweep.startup=3", "sweep.dir=all"]
    pair = [
        subprocess.Popen([*COMMAND, "-m", *search], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert [state for state, _, _ in trials(tmp_path / "all")] == ["COMPLETE"] * 3
    assert [len(starts(run)) for run in sorted((tmp_path / "all").glob("trial-*"))] == [1] * 3


def test_a_trial_that_crashed_is_run_again(tmp_path):
    obstacle = tmp_path / "all" / "trial-0001" / "config.json"
    obstacle.mkdir(parents=True)
    done = sweep(*TINY, *SPACE, "sweep.trials=2", "sweep.startup=2", "sweep.dir=all", cwd=tmp_path)
    assert done.returncode == 2
    assert "To run these again: moa-train -m sweep.dir=all" in done.stderr
    assert [state for state, _, _ in trials(tmp_path / "all")] == ["RUNNING", "COMPLETE"]
    obstacle.rmdir()
    assert sweep("sweep.dir=all", cwd=tmp_path).returncode == 0
    assert [state for state, _, _ in trials(tmp_path / "all")] == ["COMPLETE", "COMPLETE"]


def test_a_sweep_with_own_code_next_to_recipes_is_continued(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "focus.py").write_text(
        "from moa_train.engine.loss import soft_cross_entropy\n\n\ndef smooth(logits, targets):\n"
        "    return soft_cross_entropy(logits, targets)\n"
    )
    own = ["--config-dir", "recipes", "loss.name=focus:smooth"]
    assert sweep(*TINY, *own, "optim.lr=1e-3,2e-3", "sweep.dir=all", cwd=tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "all" / "lr-0.001")
    done = sweep("sweep.dir=all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "all" / "lr-0.001") == "finished"
