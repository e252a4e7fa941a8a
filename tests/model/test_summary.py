import json
import os
import subprocess
import sys

import pytest
import torch

from moa_train.model.stages import plan_stages
from moa_train.model.summary import PeakMemory, summarize, training_memory

IMAGENET = {"image_size": (224, 224), "num_classes": 1000, "patch_size": 4, "window": 14}
TINY = {"embed_dim": 96, "depths": (2, 2, 8), "heads": (3, 6, 12)}
SIZES = {
    "tiny": TINY,
    "small": {"embed_dim": 96, "depths": (2, 2, 20), "heads": (3, 6, 12)},
    "base": {"embed_dim": 128, "depths": (2, 2, 20), "heads": (4, 8, 16)},
}


@pytest.mark.parametrize(
    ("size", "parameters", "macs"),
    [("tiny", 17_638_396, 5.41e9), ("small", 39_036_940, 9.93e9), ("base", 69_091_480, 17.22e9)],
)
def test_the_released_models_cost_what_their_authors_say(size, parameters, macs):
    summary = summarize("moa", moa_form="released", **IMAGENET, **SIZES[size])
    assert summary.total_parameters == parameters
    assert summary.total_macs == pytest.approx(macs, abs=0.005e9)


def by_hand(fields: dict) -> dict[tuple[int, str], int]:
    """Multiply-accumulates from the geometry, formula by formula; fc is the MLP's ratio of 4."""
    stages = plan_stages(**{key: value for key, value in fields.items() if key != "num_classes"})
    patch, K = fields["patch_size"], None
    h, w = stages[0].map_size
    macs = {(-1, "embedding"): h * w * 3 * patch**2 * stages[0].dim}
    for stage in stages:
        (h, w), (rows, columns), P, C, i = stage.map_size, stage.windows, stage.window, stage.dim, stage.index
        padded, L = rows * columns, P * P
        macs[i, "attention"] = stage.depth * (4 * h * w * C * C + 2 * padded * L * L * C)
        macs[i, "MLP"] = stage.depth * 8 * h * w * C * C
        if stage.moa:
            K, thin, tokens = P + 2 * fields.get("moa_overlap", 1), C // fields.get("moa_reduction", 32), padded
            macs[i, "MOA"] = h * w * C * thin + tokens * thin * C * (L + 2 * K * K) + 2 * tokens**2 * C
            if fields.get("moa_form") == "released":
                macs[i, "MOA"] += tokens * C * C + h * w * 9 * C * C
            else:
                macs[i, "MOA"] += tokens * (C * C + 8 * C * C + C * C)
        if stage is not stages[-1]:
            macs[i, "merging"] = -(-h // 2) * -(-w // 2) * 8 * C * C
    macs[-1, "head"] = stages[-1].dim * fields["num_classes"]
    return macs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moa_form": "released"},
        {"moa_overlap": 3, "moa_reduction": 8},
        {"image_size": (200, 232), "window": 7},
        {"moa_enabled": False},
    ],
)
def test_every_part_is_what_the_formulas_say(changes):
    fields = {**IMAGENET, **TINY, **changes}
    summary = summarize("moa", **fields)
    assert summary.macs == by_hand(fields)
    assert set(summary.parameters) == set(summary.macs)


@pytest.mark.parametrize(
    ("name", "fields", "parameters", "macs"),  # the numbers of torchvision's documentation
    [
        (
            "swin",
            {"patch_size": 4, "embed_dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "window": 7},
            28_288_354,
            4.49e9,
        ),
        ("vit", {"patch_size": 16, "embed_dim": 768, "depths": (12,), "heads": (12,)}, 86_567_656, 17.56e9),
        ("resnet", {"patch_size": 4, "embed_dim": 64, "depths": (3, 4, 6, 3), "heads": (1,) * 4}, 25_557_032, 4.09e9),
    ],
)
def test_baselines_cost_what_torchvision_says(name, fields, parameters, macs):
    summary = summarize(name, **{"window": 7, **fields}, image_size=(224, 224), num_classes=1000)
    assert summary.total_parameters == parameters
    assert summary.total_macs == pytest.approx(macs, abs=0.005e9)
    assert set(summary.parameters) == set(summary.macs)


def test_a_summary_is_that_of_the_model_itself(small, settings_of, variant):
    name, fields = settings_of(variant)
    summary, model = summarize(name, **fields), small(variant)
    assert summary.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    maps = model.eval().forward_features(torch.randn(1, 3, *fields["image_size"]))
    assert list(summary.maps) == [tuple(map_BCHW.shape[1:]) for map_BCHW in maps]
    lines = summary.table().splitlines()
    assert len(lines) == len(summary.parameters) + 2
    assert f"{summary.total_parameters:,}" in lines[-1]
    assert "MOA" in summary.table() or variant not in ("paper", "released")


def test_peak_memory_counts_what_lives_at_one_time():
    with PeakMemory() as memory:
        a = torch.ones(1000)
        b = a + 1  # 8000 bytes live
        del a
        b.add_(1).view(10, 100)  # nothing new
        c = torch.ones(500)
        del b
    assert memory.peak == 8000
    assert memory.now == 2000
    del c
    assert memory.now == 0


STEP = """
import gc, json, sys, torch
from moa_train.model import create_model

name, fields, batch_size, dtype = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
torch.set_num_threads(1)

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def step(model, optimizer, images):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(images)
    torch.nn.functional.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.long)).backward()
    optimizer.step()
    optimizer.zero_grad()

def prepare():
    model = create_model(name, **fields)
    return model, torch.optim.AdamW(model.parameters()), torch.randn(batch_size, 3, *fields["image_size"])

step(*prepare())  # libraries keep kernels and scratch space for every shape that they have seen
gc.collect()
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
arguments = prepare()
for _ in range(2):
    step(*arguments)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("changes", "batch_size", "dtype"),
    [({}, 6, "float32"), ({"checkpointing": True, "moa_form": "released"}, 24, "bfloat16")],
)
def test_memory_of_a_training_step_is_estimated_within_a_quarter(settings_of, changes, batch_size, dtype):
    name, fields = settings_of(image_size=(32, 32), patch_size=1, embed_dim=64, moa_reduction=32, **changes)
    command = [sys.executable, "-c", STEP, json.dumps([name, fields, batch_size, dtype])]
    # glibc keeps freed memory for later unless told otherwise; what is estimated is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    real = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    estimate = training_memory(name, batch_size=batch_size, dtype=getattr(torch, dtype), **fields)
    print(f"{estimate / real:.3f} of {real / 2**20:.0f} MiB")
    assert real > 50 * 2**20  # enough for the comparison to mean something
    assert estimate == pytest.approx(real, rel=0.25)


def test_checkpointing_keeps_less_and_bf16_less(settings_of):
    name, fields = settings_of(image_size=(32, 32), patch_size=1, depths=(4, 4))
    plain, half, recomputed = (
        training_memory(name, batch_size=64, dtype=dtype, **fields, checkpointing=checkpointing)
        for dtype, checkpointing in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
    )
    assert recomputed < 0.5 * plain
    assert half < 0.7 * plain


def test_weights_count_with_their_gradients_and_states(settings_of):
    name, fields = settings_of(embed_dim=256)
    weights = 4 * summarize(name, **fields).total_parameters
    adamw, sgd = (training_memory(name, batch_size=1, states=states, **fields) for states in (2, 1))
    assert adamw - sgd == weights
    assert 4 * weights < adamw < 4.5 * weights
