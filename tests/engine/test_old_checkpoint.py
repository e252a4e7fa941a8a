"""A checkpoint of version 0.1, whose settings and state have old names, works with every command.

It comes from: python -m moa_train.cli.train model.embed_dim=4 model.depths=[1,1] model.heads=[1,2] model.window=4
model.moa.reduction=2 model.moa.form=released augment=cifar augment.off=10% optim.lr=0.02 schedule.name=constant
tracking=quiet runtime=exact runtime.device=cpu runtime.threads=1 data.limit=256 engine.ema_decay=0.99
'schedule.duration=12 steps' 'schedule.warmup=2 steps' 'engine.eval_every=10 steps' 'engine.save_every=10 steps'
'engine.stop_after=10 steps'. final.safetensors has the weights of the same run without stop_after.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

OLD = Path(__file__).parent / "old_checkpoint"
STEP = OLD / "checkpoints" / "step-00000010"
SAME_MODEL = (
    "model.embed_dim=4", "model.depths=[1,1]", "model.heads=[1,2]", "model.window=4", "model.moa.reduction=2",
    "model.moa.form=published",
)  # fmt: skip


def command(folder: Path, module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"moa_train.cli.{module}", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in ("model", "ema")
        for name, tensor in load_file(folder / f"{part}.safetensors").items()
    }


def test_a_resume_ends_with_the_weights_of_the_uninterrupted_old_run(tmp_path: Path) -> None:
    shutil.copytree(OLD / "checkpoints", tmp_path / "run" / "checkpoints")
    command(tmp_path, "train", "resume=run")
    found, expected = weights(tmp_path / "run" / "checkpoints" / "step-00000012"), load_file(OLD / "final.safetensors")
    # Equal bit for bit on the CPU that made them; others round differently.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError):  # two updates change the weights by much more
        torch.testing.assert_close(weights(STEP), expected, rtol=0, atol=1e-3)


def test_an_evaluation_counts_what_the_old_run_counted(tmp_path: Path) -> None:
    result = json.loads(command(tmp_path, "evaluate", f"ckpt={STEP}", "split=val", "output=result.json", "device=cpu"))
    assert (result["top1_count"], result["top5_count"], result["total"]) == (18, 73, 143)


def test_a_new_run_starts_from_the_old_weights(tmp_path: Path) -> None:
    settings = ["optim.lr=1e-12", "schedule.name=constant", "schedule.duration=1 step", "schedule.warmup=0%"]
    settings += ["schedule.warmup_lr=0", "schedule.min_lr=0", "engine.eval_split=none", "tracking=quiet"]
    command(tmp_path, "train", f"init={STEP}", *SAME_MODEL, *settings, "runtime.device=cpu", "run_dir=run")
    found = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors")
    torch.testing.assert_close(found, load_file(STEP / "ema.safetensors"), rtol=0, atol=1e-8)
