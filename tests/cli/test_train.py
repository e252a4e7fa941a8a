"""The moa-train command, with every setting that changes how a run trains."""

import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.runtime.errors import UserError
from moa_train.tracking.jsonl import read_rows

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ["model.embed_dim=32", "model.depths=[1,1]", "model.heads=[1,2]", "model.moa.reduction=8", "runtime.threads=1"]
QUIET = ["tracking=quiet", "tracking.images=0", "data.limit=128", "runtime.device=cpu"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moa_train.cli.train", *SMALL, *QUIET, *arguments]


def first_row(path: Path, process: subprocess.Popen) -> None:
    """Wait until a run has logged its first step."""
    until = time.monotonic() + 120
    while not (path.exists() and read_rows(path)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_signal_saves_and_stops_a_run_that_has_locked_its_folder(tmp_path, train):
    run_dir = tmp_path / "run"
    long = [f"run_dir={run_dir}", "schedule.duration=100000 steps", "tracking.log_every=1", "engine.eval_split=none"]
    arguments = [*long, "engine.save_every=100000 steps", "schedule.warmup=0"]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    try:
        first_row(run_dir / "metrics.jsonl", process)
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on .*moa_train\.cli\.train"):
            train(run_dir)  # from this second process
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, errors.decode()
    newest = CheckpointStore(run_dir).newest()
    assert newest is not None
    assert f"Stopped at step {newest.step}; saved. To resume: moa-train resume={run_dir}" in output.decode()
    assert read_rows(run_dir / "metrics.jsonl")[-1]["step"] == newest.step
    assert train(run_dir, resume=True, engine__stop_after=f"{newest.step + 2} steps") == 0
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"] == [
        *range(1, newest.step + 3)
    ]


def test_runs_of_a_sweep_have_their_own_folders_and_learn(tmp_path):
    """Run debug=overfit_batch twice, which memorizes its images."""
    arguments = ["-m", "debug=overfit_batch", "optim.lr=4e-3,8e-3", "schedule.duration=60 steps"]
    done = subprocess.run(
        command(*arguments, "data.limit=32", "engine.batch_size=32", "engine.eval_split=none", "optim.lr_scaling=none"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    runs = sorted(folder.glob("lr-*"))
    assert len(runs) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    lrs = [json.loads((run / "config.json").read_text())["optim"]["lr"] for run in runs]
    assert sorted(lrs) == [4e-3, 8e-3]
    for run in runs:
        losses = [row["loss"] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
        assert losses[0] > 2
        assert losses[-1] < 0.1
        (start,) = json.loads((run / "provenance.json").read_text())
        words = shlex.split(start["command"])
        assert words[:3] == [sys.executable, "-m", "moa_train.cli.train"]
        assert "-m" not in words[3:]
        lr = json.loads((run / "config.json").read_text())["optim"]["lr"]
        (typed,) = [word for word in words if word.startswith("optim.lr=")]
        assert float(typed.partition("=")[2]) == lr
        assert {"debug=overfit_batch", "data.limit=32", "schedule.duration=60 steps", "resume=auto"} < set(words)
        assert f"moa-eval ckpt=outputs/{folder.name}/{run.name}" in done.stdout


def test_data_errors_print_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moa_train.cli.train", "data=folder", f"data.root={tmp_path}/no", "runtime.device=cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert f"{tmp_path}/no" in done.stderr
    assert len(done.stderr.splitlines()) <= 10
    assert not list((tmp_path / "outputs").iterdir())  # no empty run folder is left


def test_packing_is_announced(make_classes, tmp_path):
    root = make_classes(3)
    arguments = ["data=cifar10", f"data.root={root}", "data.image_size=8", "model.patch_size=1", "debug=one_step"]
    done = subprocess.run(
        command(*arguments, "engine.batch_size=8", "data.limit=16"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert f"Packing the 39 images of {root}/train into {root} (needed only once)" in done.stderr.splitlines()


SHORT = {"schedule__duration": "2 steps", "schedule__warmup": "0", "engine__eval_every": "2 steps"}


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__name": "adamw"},
        {"optim__name": "nadamw"},
        {"optim__name": "sgd", "optim__clip": "value"},
        {"optim__name": "muon", "optim__clip": "none", "schedule__name": "linear"},
        {"runtime__precision": "bf16", "runtime__eval_precision": "bf16", "schedule__name": "constant"},
        {"runtime__channels_last": "true", "augment__randaugment_ops": 2, "augment__color_jitter": 0.4},
        {"engine__ema_decay": 0, "augment__erasing": 0.5, "augment__cutmix": 1.0, "augment__weak_for": "50%"},
        {"augment__repeats": 2, "augment__crop": "resized", "engine__micro_batch_size": 16},
        {"model__moa__enabled": "false", "schedule__name": "step", "schedule__milestones": "['1 step']"},
        {"model__moa__form": "published", "data__val_fraction": 0},
        {"model__name": "swin"},
        {"model__name": "vit", "model__depths": "[2]", "model__heads": "[2]", "model__drop_path": 0},
        {
            "model__name": "resnet",
            "optim__name": "adamw",
            "model__embed_dim": 64,
            "model__depths": "[1,1,1,1]",
            "model__patch_size": 2,
            "model__dropout": 0,
            "model__drop_path": 0,
        },
    ],
    ids=lambda changes: " ".join(f"{key.replace('__', '.')}={value}" for key, value in changes.items()),
)
def test_every_setting_trains(train, tmp_path, changes, outcome):
    assert train(tmp_path / "run", **SHORT, **changes) == 0
    found = outcome(tmp_path / "run")
    assert found["step"] == 2
    assert any(name.startswith("ema/") for name in found["tensors"]) == ("engine__ema_decay" not in changes)
    assert all(row["loss"] is not None for row in found["rows"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test"]["total"] == 359


def test_recomputing_activations_does_not_change_results(train, tmp_path, outcome):
    for name, value in (("plain", "false"), ("again", "true")):
        assert train(tmp_path / name, **SHORT, model__checkpointing=value) == 0
    assert outcome(tmp_path / "plain")["tensors"] == outcome(tmp_path / "again")["tensors"]


def test_fine_tuning_keeps_the_body_and_creates_a_head(train, straight, make_classes, tmp_path, capsys):
    """Go from ten digits in memory to five classes in files; the lr is so small that the body does not change."""
    changes = {"data__name": "folder", "data__root": make_classes(5), "data__val_fraction": 0, "data__workers": 1}
    still = {"optim__lr": 1e-12, "schedule__warmup_lr": 0, "schedule__min_lr": 0, "data__limit": "null"}
    with pytest.raises(UserError, match=r"the weights have 10 classes, the training images 5.*init_head=new"):
        train(tmp_path / "strict", **SHORT, **changes, **still, init=straight)
    assert train(tmp_path / "new", **SHORT, **changes, **still, init=straight, init_head="new") == 0
    assert f"Weights of {straight}: new classifier (head.bias, head.weight).\n" in capsys.readouterr().out
    newest, before = CheckpointStore(tmp_path / "new").newest(), CheckpointStore(straight).best()
    assert newest is not None
    assert before is not None
    found, start = newest.tensors("model"), before.tensors("ema")
    assert newest.state["classes"] == [f"class{label}" for label in range(5)]
    other = [name for name in start if found[name].shape != start[name].shape]
    assert other == ["head.weight", "head.bias"] or set(other) == {"head.weight", "head.bias"}
    for name in start.keys() - set(other):
        torch.testing.assert_close(found[name], start[name], rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "new" / "result.json").read_text())["test"]["total"] == 20


def test_profiling_writes_a_trace(train, tmp_path):
    changes = {"schedule__duration": "6 steps", "engine__eval_split": "none", "tracking__profile_steps": 2}
    assert train(tmp_path / "run", **changes) == 0
    trace = json.loads(gzip.decompress((tmp_path / "run" / "trace.json.gz").read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}  # counted from 0, after three warmup steps
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_a_stopped_session_says_how_to_resume(train, tmp_path, capsys):
    assert train(tmp_path / "run", **SHORT, engine__stop_after="1 step") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "stopped at step 1 of 2, as engine.stop_after requests" in lines
    assert ["resume", "moa-train", f"resume={tmp_path}/run"] in [line.split() for line in lines]
    assert train(tmp_path / "run", resume=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "done" in lines
    assert not any(line.startswith("  resume ") for line in lines)


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_best_checkpoint_is_reported_with_intact_alternatives(train, tmp_path, damage):
    run_dir = tmp_path / "run"
    still = {
        "optim__lr": 1e-12,
        "schedule__warmup_lr": 0,
        "schedule__min_lr": 0,
    }  # the first of equal scores is the best
    lasting = {"schedule__duration": "5 steps", "schedule__warmup": 0, "engine__eval_every": "2 steps"}
    assert train(run_dir, **still, **lasting, engine__save_every="1 step", engine__keep_every="1 step") == 0
    store = CheckpointStore(run_dir)
    best = store.best()
    assert best is not None
    assert best.step == 2
    weights = best.path / "model.safetensors"
    if damage == "flipped":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    else:
        shutil.rmtree(best.path)
    with pytest.raises(UserError) as error:
        train(run_dir, resume=True)
    message = str(error.value)
    assert f"the best one (top1 {best.score:.4g} on val)" in message
    assert (str(weights) if damage == "flipped" else "no checkpoint of step 2. Available steps: 1, 3, 4, 5") in message
    assert f"moa-eval ckpt={run_dir}/checkpoints/step-00000005" in message
    newest = store.newest()
    assert newest is not None
    assert newest.step == 5


def test_a_failed_run_releases_its_folder(train, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        train(tmp_path / "run", init=tmp_path / "nowhere")
    assert train(tmp_path / "run", **SHORT) == 0
