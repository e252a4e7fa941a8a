"""A training session: what it prints, and what it refuses."""

import gc
import json
import shlex
import shutil
import threading
import weakref

import pytest

from moa_train.assembly import session
from moa_train.assembly.commands import command
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.nonfinite import RollBack
from moa_train.runs.folder import status
from moa_train.runtime import faults
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import Exit
from moa_train.tracking.jsonl import read_rows
from moa_train.tracking.provenance import source_digest

RESNET = {
    "model__name": "resnet",
    "model__embed_dim": 64,
    "model__patch_size": 4,
    "model__dropout": 0,
    "model__drop_path": 0,
    "optim__name": "sgd",
}


def test_printed_commands_can_be_pasted(train, tmp_path, capsys):
    run_dir = tmp_path / "lr=1, it's [a]"
    assert train(run_dir, engine__stop_after="1 step") == 0
    lines = capsys.readouterr().out.splitlines()
    (resume,) = [line.split(None, 1)[1] for line in lines if line.startswith("  resume")]
    program, argument = shlex.split(resume)
    assert program == "moa-train"
    assert argument == "resume='" + str(run_dir).replace("'", "\\'") + "'"  # Hydra's quotes


def test_the_next_command_evaluates_a_split_that_exists(train, make_classes, tmp_path, capsys):
    def printed(run_dir, **changes):
        assert train(run_dir, schedule__duration="1 step", schedule__warmup=0, **changes) == 0
        return [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("  next ")]

    root = make_classes(2)
    shutil.rmtree(root / "test")
    folder = {"data__name": "folder", "data__root": root, "data__val_fraction": 0, "data__image_size": 8}
    changes = {**folder, "data__limit": "null", "engine__batch_size": 8, "data__workers": 0}
    assert printed(tmp_path / "run", **changes) == [["moa-eval", f"ckpt={tmp_path}/run", "split=val"]]
    assert printed(tmp_path / "digits") == [["moa-eval", f"ckpt={tmp_path}/digits"]]


def test_printed_commands_allow_the_own_code_of_the_run(tiny):
    config = tiny()
    assert command("moa-train", config, resume="run") == "moa-train resume=run"
    config.model.name, config.loss.name, config.code = "my_package.blocks:Tiny", "other:focal", ["my_package"]
    assert command("moa-eval", config, ckpt="run") == "moa-eval ckpt=run 'code=[my_package,other]'"


def test_batch_normalization_with_one_value_per_channel_is_named(train, tmp_path):
    changes = {**RESNET, "model__depths": "[1,1,1,1]"}
    with pytest.raises(UserError, match=r"Batch normalization needs .*engine\.micro_batch_size=1 and images of 32"):
        train(tmp_path / "run", engine__micro_batch_size=1, **changes)


def test_ranks_compare_their_code_and_the_files_of_the_checkpoint(train, tmp_path, monkeypatch):
    """That different values are an error on every rank is shown in runtime/test_distributed.py."""
    compared = {}
    monkeypatch.setattr(Distributed, "check_same", lambda self, what, value, *advice: compared.update({what: value}))
    assert train(tmp_path, engine__stop_after="1 step") == 0
    assert compared["configuration and code"]["code"] == source_digest()
    newest = CheckpointStore(tmp_path).newest()
    assert train(tmp_path, resume=True, engine__stop_after="2 steps") == 0
    assert compared[f"the files of {newest.path}"] == newest.digest


def test_training_works_in_a_thread(train, straight, outcome, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train(tmp_path / "run")))
    thread.start()
    thread.join()
    assert codes == [0]
    found, expected = outcome(tmp_path / "run"), outcome(straight)
    assert found["tensors"] == expected["tensors"]


def test_the_configuration_is_recorded_as_composed(train, tmp_path):
    """Otherwise, seeds for which other kernels were measured would count as other settings."""
    assert train(tmp_path / "run", runtime__attention="auto", runtime__deterministic=False) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (start,) = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert config["runtime"]["attention"] == "auto"
    assert start["choices"]["values"]["runtime.attention"] in ("plain", "fused")


def test_a_run_that_continues_is_not_finished(train, tmp_path, monkeypatch):
    assert train(tmp_path / "run", engine__stop_after="4 steps") == 0
    assert status(tmp_path / "run") == "finished"
    seen, real = [], session.train
    monkeypatch.setattr(session, "train", lambda *run: seen.append(status(tmp_path / "run")) or real(*run))
    assert train(tmp_path / "run", resume=True) == 0
    assert seen == ["running"]
    assert status(tmp_path / "run") == "finished"


def test_unreadable_images_are_listed_after_a_stop(train, make_classes, tmp_path):
    root, run = make_classes(2), tmp_path / "run"
    victims = [next((root / "train" / name).iterdir()) for name in ("class0", "class1")]
    for victim in victims:
        victim.write_text("no image")
    data = {"data__name": "folder", "data__root": root, "data__val_fraction": 0, "data__limit": "null"}
    data |= {"data__image_size": 8, "data__workers": 0, "data__unreadable": "quarantine"}
    faults.arm({"MOA_TRAIN_FAULTS": "step.loss=term@2"})
    try:
        code = train(run, **data, engine__batch_size=26)  # a step draws all images
    finally:
        faults.arm({})
    assert code == Exit.STOPPED
    assert all(str(victim) in (run / "unreadable.txt").read_text() for victim in victims)


def test_a_rollback_releases_the_discarded_run(train, tmp_path, monkeypatch):
    """Two models with their optimizers might not fit into memory."""
    built, real = [], (session.build_run, session.train)

    def build(*args, **settings):
        gc.collect()
        assert not [model for model in built if model() is not None]
        run = real[0](*args, **settings)
        built.append(weakref.ref(run.model))
        return run

    def train_once(run, distributed):
        if len(built) == 1:
            raise RollBack("Rolling back", nonfinite=1, lr_factor=0.5)
        return real[1](run, distributed)

    monkeypatch.setattr(session, "build_run", build)
    monkeypatch.setattr(session, "train", train_once)
    assert train(tmp_path / "run") == 0
    assert len(built) == 2


def test_a_rollback_is_saved_at_once(train, tmp_path, monkeypatch, capsys):
    """A run that is killed before the next checkpoint must not return to the old learning rate."""
    assert train(tmp_path / "run", engine__stop_after="4 steps") == 0
    calls, real = [], session.train

    def killed(step):
        raise RuntimeError("killed before the first step")

    def train_once(run, distributed):
        calls.append(run.trainer.state.lr_factor)
        if len(calls) == 1:
            raise RollBack("Rolling back", nonfinite=1, lr_factor=0.5)
        run.trainer.train_batches = killed
        return real(run, distributed)

    monkeypatch.setattr(session, "train", train_once)
    with pytest.raises(RuntimeError, match="killed before"):
        train(tmp_path / "run", resume=True)
    assert calls == [1.0, 0.5]
    assert capsys.readouterr().out.count("; x 0.5 after rollbacks\n") == 1
    newest = CheckpointStore(tmp_path / "run").newest()
    assert newest.step == 4
    assert [newest.state["train"][key] for key in ("lr_factor", "nonfinite")] == [0.5, 1]
    # The rollback is not another start: moa-eval command=true would print its command twice.
    assert [start["first_step"] for start in newest.state["origin"]] == [0, 4]
    assert len(json.loads((tmp_path / "run" / "provenance.json").read_text())) == 2


def test_an_evaluation_that_chose_the_checkpoint_is_logged_once(train, tmp_path):
    changes = {"engine__eval_split": "test", "engine__eval_every": "4 steps", "engine__stop_after": "6 steps"}
    assert train(tmp_path / "run", **changes) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [4]


def test_a_finished_run_refuses_what_would_only_change_its_training(straight, train, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    with pytest.raises(UserError, match=r"is finished: it has completed 12 steps.*\n  optim\.lr: 0\.0009 -> 1"):
        train(run, resume=True, optim__lr=1.0)
    assert train(run, resume=True, engine__eval_batch_size=7) == 0
