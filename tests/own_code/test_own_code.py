"""A package of a user's own, with one part of each kind, through every command; docs/DEVELOPMENT.md shows its files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGE = HERE / "my_package"
PARTS = {
    "model.name": "my_package.blocks:Tiny",
    "data.name": "my_package.parity:Parity",
    "augment.extra": "[my_package.drops:drop_top]",
    "optim.name": "my_package.signs:sign_descent",
    "schedule.name": "my_package.curves:inverse_root",
    "loss.name": "my_package.losses:focal",
    "engine.metrics": "[top1,my_package.metrics:Balanced]",
    "tracking.loggers": "[my_package.notes:Notes]",
}
SETTINGS = {
    "model.args.width": "12",
    "augment.args.drop_top.probability": "0.3",
    "schedule.args.scale": "5",
    "loss.args.gamma": "1",
    "tracking.args.Notes.file": "diary.txt",
    "engine.best_by": "Balanced",
    "optim.layer_decay": "0.5",
    "optim.lr": "1e-2",
    "optim.lr_scaling": "none",
    "data.image_size": "8",
    "data.val_fraction": "0.2",
    "schedule.duration": "12 steps",
    "schedule.warmup": "2 steps",
    "engine.batch_size": "32",
    "engine.eval_every": "4 steps",
    "engine.save_every": "4 steps",
    "tracking.progress": "plain",
    "runtime.device": "cpu",
    "runtime.precision": "fp32",
    "runtime.threads": "1",
}
NAMED = [f"{key}={value}" for key, value in PARTS.items()]
ALL = [*NAMED, *(f"{key}={value}" for key, value in SETTINGS.items())]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))


def run(command: str, *arguments: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launch, "-m", f"moa_train.cli.{command}", *arguments],
        cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped after 6 of 12 steps and resumed, and the same run without a stop."""
    path = tmp_path_factory.mktemp("own")
    first = run("train", *ALL, "run_dir=run", "engine.stop_after=6 steps", cwd=path)
    assert first.returncode == 0, first.stderr
    refused = run("train", "resume=run", cwd=path)
    assert refused.returncode == 2
    assert "code=[my_package.blocks,my_package.parity," in refused.stderr
    second = run("train", "resume=run", "code=[my_package]", cwd=path)
    assert second.returncode == 0, second.stderr
    straight = run("train", *ALL, "run_dir=straight", cwd=path)
    assert straight.returncode == 0, straight.stderr
    return path


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_own_parts_is_resumed_to_the_bit(folder: Path) -> None:
    machine = {"seconds", "images_per_second", "memory"}
    logged = [
        [{key: value for key, value in row.items() if key not in machine} for row in rows(folder / name)]
        for name in ("run", "straight")
    ]
    end_of_first_session = [row for row in logged[0] if row["step"] == 6 and row.get("split") == "test"]
    assert [row for row in logged[0] if row not in end_of_first_session] == logged[1]
    assert any("Balanced" in row for row in logged[1])
    lines = [line.split() for line in (folder / "run" / "diary.txt").read_text().splitlines()]
    assert [int(line[0]) for line in lines if line[1] == "val"] == [4, 8, 12]


def test_the_best_checkpoint_is_chosen_by_the_own_metric(folder: Path) -> None:
    result = json.loads((folder / "run" / "result.json").read_text())
    val = {row["step"]: row["Balanced"] for row in rows(folder / "run") if row.get("split") == "val"}
    assert val[result["step"]] == max(val.values())


def test_records_hold_every_setting_and_where_the_code_is(folder: Path) -> None:
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["model"]["name"] == PARTS["model.name"]
    assert config["model"]["args"] == {"width": 12}


def test_weights_are_evaluated_only_with_code_that_the_command_names(folder: Path) -> None:
    refused = run("evaluate", "ckpt=run", cwd=folder)
    assert refused.returncode == 2
    assert "A file by itself cannot make moa-train run code" in refused.stderr
    done = run("evaluate", "ckpt=run", "code=[my_package]", "device=cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    test = json.loads((folder / "run" / "result.json").read_text())["test"]
    assert {key: json.loads(done.stdout)[key] for key in test} == test


def test_two_ranks_train_the_same(folder: Path) -> None:
    done = run("train", *ALL, "run_dir=two", cwd=folder, ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = ([row for row in rows(folder / name) if row["kind"] == "train"][-1] for name in ("straight", "two"))
    assert first["loss"] == pytest.approx(second["loss"], rel=0.05)


def test_a_summary_counts_the_own_model(folder: Path) -> None:
    done = run("model", "summary", *NAMED, "model.args.width=12", "data.image_size=8", cwd=folder)
    assert done.returncode == 0, done.stderr
    parameters = 3 * 6 * 9 + 6 + 6 * 12 * 9 + 12 + 12 * 2 + 2
    assert f"{parameters:,}" in done.stdout


def test_help_lists_the_own_settings(folder: Path) -> None:
    shown = run("train", *NAMED, "--help", cwd=folder).stdout
    for line in ("model.args.width=8 ", "loss.args.gamma=2.0 ", "tracking.args.Notes.file=notes.txt "):
        assert f"  {line}" in shown


CHILD = """
import contextlib, io, json, sys
from moa_train.cli.train import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv, said = ["moa-train", *arguments], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as leaving:
            found.append([leaving.code, said.getvalue()])
print(json.dumps(found))
"""
MISTAKES = {
    "model.args.widht=8": "Unknown key model.args.widht. Did you mean 'width'?",
    "model.args.width=x": "model.args.width='x' has the wrong type: it must be an integer",
    "model.args.width=1": "model.args.width=1 is out of range: it must be >= 2",
    "model.name=my_package.blocks:Tinny": "my_package.blocks has no Tinny. Did you mean 'Tiny'?",
    "model.name=my_pakage.blocks:Tiny": "no module named my_pakage",
    "engine.best_by=loss": "engine.best_by=loss must be one of engine.metrics: top1, Balanced",
    "optim.args.x=1": "has no settings of its own",
    "engine.args.Balnced.x=1": "engine.args.Balnced belongs to no entry of engine.metrics. Did you mean",
    "tracking.args.file=x": "tracking.args.file belongs to no entry of tracking.loggers. Entries: Notes",
    "tracking.args.Notes=x": "tracking.args.Notes=x must be settings of logger my_package.",
}


def test_mistakes_are_explained(tmp_path: Path) -> None:
    """One process tries all of them, because importing torch takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps([[*ALL, mistake] for mistake in MISTAKES]),
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (code, said), (mistake, expected) in zip(json.loads(done.stdout), MISTAKES.items(), strict=True):
        assert code == 2, mistake
        assert expected in said, mistake
    assert not list(tmp_path.iterdir())


def test_the_documentation_shows_these_files() -> None:
    text = (HERE.parents[1] / "docs" / "DEVELOPMENT.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name in ("blocks", "parity", "drops", "signs", "curves", "losses", "metrics", "notes"):
        assert (PACKAGE / f"{name}.py").read_text() in shown, f"{name}.py is not in docs/DEVELOPMENT.md as it is"
