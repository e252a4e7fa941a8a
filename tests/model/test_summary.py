import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from moa_train.interfaces import Classifier
from moa_train.model.stages import plan_stages
from moa_train.model.summary import PeakMemory, summarize, training_cost
from moa_train.schema import ModelConfig
from moa_train.serialization import to_dict

IMAGENET = {"image_size": (224, 224), "num_classes": 1000}
SIZES = {
    "tiny": {},
    "small": {"depths": [2, 2, 20]},
    "base": {"embed_dim": 128, "depths": [2, 2, 20], "heads": [4, 8, 16]},
}


@pytest.mark.parametrize(
    ("size", "parameters", "macs"),
    [("tiny", 17_638_396, 5.41e9), ("small", 39_036_940, 9.93e9), ("base", 69_091_480, 17.22e9)],
)
def test_the_published_models_cost_what_their_authors_say(model_config, size, parameters, macs):
    summary = summarize(model_config(moa_form="published", **SIZES[size]), **IMAGENET)
    assert summary.total_parameters == parameters
    assert summary.total_macs == pytest.approx(macs, abs=0.005e9)


def by_hand(config: ModelConfig, image_size: tuple[int, int], num_classes: int) -> dict[tuple[int, str], int]:
    """Return multiply-accumulates from the geometry, formula by formula, for an MLP ratio of 4."""
    stages = plan_stages(config, image_size)
    patch, (h, w) = config.patch_size, stages[0].map_size
    macs = {(-1, "embedding"): h * w * 3 * patch**2 * stages[0].dim}
    for stage in stages:
        (h, w), (rows, columns), P, C, i = stage.map_size, stage.windows, stage.window, stage.dim, stage.index
        padded, L = rows * columns, P * P
        macs[i, "attention"] = stage.depth * (4 * h * w * C * C + 2 * padded * L * L * C)
        macs[i, "MLP"] = stage.depth * 8 * h * w * C * C
        if stage.moa:
            K, thin, tokens = P + 2 * config.moa.overlap, C // config.moa.reduction, padded
            macs[i, "MOA"] = h * w * C * thin + tokens * thin * C * (L + 2 * K * K) + 2 * tokens**2 * C
            if config.moa.form == "published":
                macs[i, "MOA"] += tokens * C * C + h * w * 9 * C * C
            else:
                macs[i, "MOA"] += tokens * (C * C + 8 * C * C + C * C)
        if stage is not stages[-1]:
            macs[i, "merging"] = -(-h // 2) * -(-w // 2) * 8 * C * C
    macs[-1, "head"] = stages[-1].dim * num_classes
    return macs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moa_form": "published"},
        {"moa_overlap": 3, "moa_reduction": 8},
        {"image_size": (200, 232), "window": 7},
        {"moa_enabled": False},
    ],
)
def test_every_part_is_what_the_formulas_say(model_config, changes):
    geometry = {key: changes.pop(key, value) for key, value in IMAGENET.items()}
    config = model_config(**changes)
    summary = summarize(config, **geometry)
    assert summary.macs == by_hand(config, **geometry)
    assert set(summary.parameters) == set(summary.macs)


@pytest.mark.parametrize(
    ("fields", "parameters", "macs"),  # the numbers of torchvision's documentation
    [
        (
            {"name": "swin", "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24], "window": 7},
            28_288_354,
            4.49e9,
        ),
        ({"name": "vit", "patch_size": 16, "embed_dim": 768, "depths": [12], "heads": [12]}, 86_567_656, 17.56e9),
        ({"name": "resnet", "embed_dim": 64, "depths": [3, 4, 6, 3]}, 25_557_032, 4.09e9),
    ],
)
def test_baselines_cost_what_torchvision_says(model_config, fields, parameters, macs):
    summary = summarize(model_config(**fields), **IMAGENET)
    assert summary.total_parameters == parameters
    assert summary.total_macs == pytest.approx(macs, abs=0.005e9)
    assert set(summary.parameters) == set(summary.macs)


class Products(Classifier):
    """An own model that multiplies in its own forward pass and in a module without parameters."""

    class Square(nn.Module):
        def forward(self, x_BCD: torch.Tensor) -> torch.Tensor:
            return x_BCD @ x_BCD.transpose(1, 2)

    def __init__(self, config: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.square = self.Square()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCD = images_BCHW.flatten(2)
        return self.head((self.square(x_BCD) @ x_BCD).mean(2))


def test_products_outside_of_parts_with_parameters_are_counted(model_config):
    summary = summarize(model_config(name=f"{__name__}:Products"), image_size=(4, 8), num_classes=5)
    assert summary.macs == {(-1, "model"): 3 * 3 * 32, (-1, "square"): 3 * 32 * 3, (-1, "head"): 3 * 5}
    assert summary.total_macs == 3 * 3 * 32 + 3 * 32 * 3 + 3 * 5
    rows = [line.split() for line in summary.table().splitlines()[1:]]
    assert [row[:2] for row in rows] == [["head", "20"], ["square", "0"], ["model", "0"], ["total", "20"]]


def test_a_summary_is_that_of_the_model_itself(small, small_config, variant):
    config, geometry = small_config(variant)
    summary, model = summarize(config, **geometry), small(variant)
    assert summary.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    maps = model.eval().forward_features(torch.randn(1, 3, *geometry["image_size"]))
    assert list(summary.maps) == [tuple(map_BCHW.shape[1:]) for map_BCHW in maps]
    lines = summary.table().splitlines()
    assert len(lines) == len(summary.parameters) + 2
    assert f"{summary.total_parameters:,}" in lines[-1]
    assert "MOA" in summary.table() or variant not in ("paper", "published")


def test_peak_memory_counts_tensors_that_are_alive_together():
    with PeakMemory() as memory:
        a = torch.ones(1000)
        b = a + 1  # 8000 bytes are alive
        del a
        b.add_(1).view(10, 100)  # no new memory
        c = torch.ones(500)
        del b
    assert memory.peak == 8000
    assert memory.now == 2000
    del c
    assert memory.now == 0


STEP = """
import gc, json, sys, torch
from moa_train.model.registry import create_model
from moa_train.schema import ModelConfig
from moa_train.serialization import from_dict

config, geometry, batch_size, dtype = json.loads(sys.argv[1])
config, geometry["image_size"] = from_dict(config, ModelConfig, "model."), tuple(geometry["image_size"])
dtype = getattr(torch, dtype)
torch.set_num_threads(1)

def mapped(key):  # address space: resident memory also depends on what the kernel swaps out
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def step(model, optimizer, images):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(images)
    torch.nn.functional.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.long)).backward()
    optimizer.step()
    optimizer.zero_grad()

def prepare():
    model = create_model(config, **geometry)
    return model, torch.optim.AdamW(model.parameters()), torch.randn(batch_size, 3, *geometry["image_size"])

step(*prepare())  # libraries cache kernels and scratch space for every shape
gc.collect()
before = mapped("VmSize")
arguments = prepare()
for _ in range(2):
    step(*arguments)
print(mapped("VmPeak") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("changes", "batch_size", "dtype"),
    [({}, 6, "float32"), ({"checkpointing": True, "moa_form": "published"}, 24, "bfloat16")],
)
def test_memory_of_a_training_step_is_estimated_within_a_quarter(small_config, changes, batch_size, dtype):
    config, geometry = small_config(image_size=(32, 32), patch_size=1, embed_dim=64, moa_reduction=32, **changes)
    command = [sys.executable, "-c", STEP, json.dumps([to_dict(config), geometry, batch_size, dtype])]
    # By default glibc keeps freed memory; the estimate counts only memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    real = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    estimate = training_cost(config, batch_size=batch_size, dtype=getattr(torch, dtype), **geometry).memory
    print(f"{estimate / real:.3f} of {real / 2**20:.0f} MiB")
    assert real > 50 * 2**20  # enough for a meaningful comparison
    assert estimate == pytest.approx(real, rel=0.25)


def test_checkpointing_and_bf16_save_memory(small_config):
    config, geometry = small_config(image_size=(32, 32), patch_size=1, depths=[4, 4])
    plain, half, recomputed = (
        training_cost(replace(config, checkpointing=checkpointing), batch_size=64, dtype=dtype, **geometry).memory
        for dtype, checkpointing in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
    )
    assert recomputed < 0.5 * plain
    assert half < 0.7 * plain


def test_weights_count_with_their_gradients_and_states(small_config):
    config, geometry = small_config(embed_dim=256)
    weights = 4 * summarize(config, **geometry).total_parameters
    adamw, sgd = (training_cost(config, batch_size=1, states=states, **geometry).memory for states in (2, 1))
    assert adamw - sgd == weights
    assert 4 * weights < adamw < 4.5 * weights
