"""Resuming a run: which configuration applies, and which settings may change."""

import shutil
from pathlib import Path

import pytest

from moa_train.assembly import resume
from moa_train.assembly.resume import changes
from moa_train.assembly.run_dir import run_folder
from moa_train.cli.train import with_overrides
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.knobs import knobs
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig


def resolve_resume(config: RunConfig, overrides: list[str]) -> tuple[RunConfig, list[str]]:
    return resume.resolve_resume(config, lambda before: with_overrides(before, overrides))


@pytest.fixture(scope="module")
def run_dir(straight, tmp_path_factory) -> Path:
    return shutil.copytree(straight, tmp_path_factory.mktemp("resume") / "run", symlinks=True)


def test_a_run_folder_provides_its_own_configuration(run_dir):
    now, changed = resolve_resume(RunConfig(resume=str(run_dir)), [f"resume={run_dir}"])
    assert changed == []
    assert (now.model.embed_dim, now.optim.name, now.run_dir) == (32, "muon", str(run_dir))
    assert now.engine.micro_batch_size == 32


def test_a_preflight_of_a_run_does_not_resume_it(run_dir):
    now, changed = resolve_resume(RunConfig(resume=str(run_dir), preflight=True), [f"resume={run_dir}"])
    assert now.preflight
    assert changed == []


def test_changes_are_reported_with_old_and_new_values(run_dir):
    typed = [f"resume={run_dir}", "optim.lr=1e-5", "schedule.duration=20 steps", "data.workers=3", "data.mean=null"]
    now, changed = resolve_resume(RunConfig(resume=str(run_dir)), typed)
    assert sorted(changed) == [
        "data.workers: None -> 3",
        "optim.lr: 0.0009 -> 1e-05",
        "schedule.duration: 12 steps -> 20 steps",
    ]
    assert now.optim.lr == 1e-5


@pytest.mark.parametrize("key", [key for key, item, _ in knobs(RunConfig()) if item.metadata["fixed"]])
def test_changes_of_fixed_settings_are_rejected(tiny, key):
    before, now = tiny(), tiny()
    part = now
    for section in key.split(".")[:-1]:
        part = getattr(part, section)
    name = key.split(".")[-1]
    setattr(part, name, "other")
    with pytest.raises(UserError, match="cannot be resumed") as error:
        changes(before, now)
    assert f"  {key}: " in str(error.value)
    assert "-> other" in str(error.value)
    assert "init=" in str(error.value)


@pytest.mark.parametrize(
    ("typed", "fragments"),
    [
        ("model=moa_t", ["model=moa_t", "individual settings", "optim.lr=1e-4"]),
        ("optim.name=sgd", ["optim.name: muon -> sgd", "init="]),
        ("engine.batch_size=64", ["engine.batch_size: 32 -> 64"]),
        ("runtime.seed=1", ["runtime.seed: 0 -> 1"]),
        ("optim.lr=-1", ["optim.lr=-1", "> 0"]),
    ],
)
def test_rejections_say_which_setting_and_what_to_do(run_dir, typed, fragments):
    with pytest.raises(UserError) as error:
        resolve_resume(RunConfig(resume=str(run_dir)), [f"resume={run_dir}", typed])
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/last", "checkpoints/step-00000012/"])
def test_a_folder_inside_the_run_means_the_run(run_dir, inside):
    now, _ = resolve_resume(RunConfig(resume=f"{run_dir}/{inside}"), [])
    assert now.run_dir == str(run_dir)


def test_a_run_is_not_resumed_from_an_older_checkpoint(run_dir):
    older = f"{run_dir}/checkpoints/step-00000004"
    with pytest.raises(UserError, match=rf"newest checkpoint, step 12, with resume={run_dir}\. .*: init={older}\."):
        resolve_resume(RunConfig(resume=older), [])


def test_a_folder_in_use_is_not_overwritten(run_dir, tiny):
    config = tiny()
    config.run_dir = str(run_dir)
    with pytest.raises(UserError, match=r"already holds a run \(step 12\).*resume=.*another run_dir"):
        resolve_resume(config, [])


def test_resuming_without_a_checkpoint(tmp_path, tiny):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        resolve_resume(RunConfig(resume=str(tmp_path)), [])
    config = tiny()
    config.resume, config.run_dir = "auto", str(tmp_path / "new")
    assert resolve_resume(config, []) == (config, [])


def test_auto_takes_the_commands_configuration(run_dir, tiny):
    config = tiny({"optim.lr": 1e-5})
    config.resume, config.run_dir = "auto", str(run_dir)
    now, changed = resolve_resume(config, [])
    assert now is config
    assert changed == ["optim.lr: 0.0009 -> 1e-05"]
    other = tiny({"model.embed_dim": 16})
    other.resume, other.run_dir = "auto", str(run_dir)
    with pytest.raises(UserError, match=r"model\.embed_dim: 32 -> 16"):
        resolve_resume(other, [])


def test_stop_after_is_not_inherited(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, engine__stop_after="1 step", engine__eval_split="none") == 0
    now, changed = resolve_resume(RunConfig(resume=str(run)), [])
    assert now.engine.stop_after is None
    assert changed == []


def test_a_resumed_run_does_not_need_its_initial_weights(straight, train, tmp_path):
    """Fine-tune, stop, and resume twice after the weights have been deleted."""
    weights = tmp_path / "weights.safetensors"
    shutil.copy(next((straight / "checkpoints").glob("step-*")) / "ema.safetensors", weights)
    run = tmp_path / "run"
    assert train(run, init=str(weights), engine__stop_after="1 step", engine__eval_split="none") == 0
    weights.unlink()
    for stop in ("2 steps", "3 steps"):
        assert train(run, resume=True, engine__stop_after=stop) == 0
    newest = CheckpointStore(run).newest()
    assert newest is not None
    assert newest.step == 3
    assert newest.state["config"]["init"] == str(weights)  # the origin of the weights is still recorded


def test_overrides_are_converted_to_the_types_of_settings():
    config = with_overrides(RunConfig(), ["data.mean=[0,0.5,1]", "optim.lr=1", "model.moa={overlap:2}", "run_dir=x"])
    assert (config.data.mean, config.optim.lr, config.model.moa.overlap) == ([0.0, 0.5, 1.0], 1.0, 2)
    assert config.model.moa.reduction == RunConfig().model.moa.reduction
    assert config.run_dir is None  # with_overrides ignores run_dir


def test_a_new_run_does_not_take_over_a_folder_that_another_run_filled_meanwhile(run_dir):
    with (
        Distributed.start("cpu", 60.0) as alone,
        pytest.raises(UserError, match=r"already holds a run \(step 12\)"),
        run_folder(RunConfig(run_dir=str(run_dir)), alone),
    ):
        pass
