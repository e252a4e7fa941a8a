"""A training session: what it prints, and what it refuses."""

import shlex
import shutil
import threading

import pytest

from moa_train.assembly.commands import command
from moa_train.runtime.errors import UserError

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


def test_training_works_in_a_thread(train, straight, outcome, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train(tmp_path / "run")))
    thread.start()
    thread.join()
    assert codes == [0]
    found, expected = outcome(tmp_path / "run"), outcome(straight)
    assert found["tensors"] == expected["tensors"]
