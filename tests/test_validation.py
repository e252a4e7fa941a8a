"""Ranges and rules of the configuration without Hydra; cli/test_app.py tests the messages of the command line."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_train.knobs import knobs
from moa_train.runtime.errors import UserError
from moa_train.schema import EvalConfig, ExportConfig, PredictConfig, RunConfig
from moa_train.validation import validate


def changed(**changes: Any) -> RunConfig:
    config = RunConfig()
    for key, value in changes.items():
        *sections, name = key.split("__")
        part = config
        for section in sections:
            part = getattr(part, section)
        assert hasattr(part, name)
        setattr(part, name, value)
    return config


def test_the_defaults_are_valid():
    validate(RunConfig())
    validate(EvalConfig())
    validate(ExportConfig())
    validate(PredictConfig())


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"optim__lr": 0.0}, ["optim.lr=0.0", "> 0"]),
        ({"optim__lr": math.nan}, ["optim.lr=nan"]),
        ({"optim__weight_decay": math.inf}, ["optim.weight_decay=inf"]),
        ({"optim__betas": [0.9, 1.0]}, ["optim.betas=1.0", "< 1"]),
        ({"optim__betas": [0.9]}, ["optim.betas=[0.9]", "2 entries"]),
        ({"optim__momentum": 1.0}, ["optim.momentum=1.0", "< 1"]),
        ({"optim__clip": "max"}, ["optim.clip=max", "norm, value, none"]),
        ({"optim__clip_value": 0.0}, ["optim.clip_value=0.0", "> 0"]),
        ({"engine__ema_decay": 1.0}, ["engine.ema_decay=1.0", "< 1"]),
        ({"engine__batch_size": 0}, ["engine.batch_size=0", ">= 1"]),
        ({"engine__batch_size": 64, "engine__micro_batch_size": 48}, ["batch_size=64", "48 or 96"]),
        ({"engine__batch_size": 8, "engine__micro_batch_size": 16}, ["batch_size=8", ": 16"]),
        ({"engine__eval_split": "dev"}, ["engine.eval_split=dev", "auto, val, test, none"]),
        ({"engine__keep_last": 0}, ["engine.keep_last=0", ">= 1"]),
        ({"model__depths": [2, -1]}, ["model.depths=-1", ">= 1"]),
        ({"model__name": "moe"}, ["model.name=moe", "'moa'"]),
        ({"model__moa__form": "publish"}, ["model.moa.form=publish", "paper, published"]),
        ({"model__moa__drop_path": 1.0}, ["model.moa.drop_path=1.0", "<= 0.99"]),
        ({"data__val_fraction": 0.7}, ["data.val_fraction=0.7", "<= 0.5"]),
        ({"data__image_size": "abc"}, ["data.image_size=abc", "[height, width]"]),
        ({"data__image_size": [1, 2, 3]}, ["data.image_size=[1, 2, 3]"]),
        ({"data__image_size": 0}, ["data.image_size=0"]),
        ({"data__name": "imagenet"}, ["data=imagenet", "data.root=FOLDER"]),
        ({"data__download": True}, ["data.download=true", "digits cannot be downloaded"]),
        ({"data__mean": [0.5]}, ["data.mean=[0.5]", "3 entries"]),
        ({"data__std": [0.5, 0.0, 0.5]}, ["data.std=0.0", "> 0"]),
        ({"augment__scale": [0.9, 0.1]}, ["augment.scale=[0.9, 0.1]", "exceeds"]),
        ({"augment__ratio": [1.0]}, ["augment.ratio=[1.0]", "2 entries"]),
        ({"augment__crop": "center"}, ["augment.crop=center", "pad, resized, none"]),
        ({"augment__scale": [0.0, 1.0]}, ["augment.scale=0.0", "> 0"]),
        ({"augment__scale": [0.5, 1.2]}, ["augment.scale=1.2", "<= 1"]),
        ({"augment__scale": [math.nan, 1.0]}, ["augment.scale=nan"]),
        ({"augment__ratio": [2.0, 1.0]}, ["augment.ratio=[2.0, 1.0]", "exceeds"]),
        ({"augment__padding": -1}, ["augment.padding=-1", ">= 0"]),
        ({"augment__interpolation": "random"}, ["augment.interpolation=random", "bilinear, bicubic"]),
        ({"augment__flip": 1.5}, ["augment.flip=1.5", "<= 1"]),
        ({"augment__erasing": -0.1}, ["augment.erasing=-0.1", ">= 0"]),
        ({"augment__color_jitter": math.nan}, ["augment.color_jitter=nan"]),
        ({"augment__randaugment_ops": -1}, ["augment.randaugment_ops=-1", ">= 0"]),
        ({"augment__randaugment_magnitude": 12.0}, ["augment.randaugment_magnitude=12.0", "<= 10"]),
        ({"augment__randaugment_std": -1.0}, ["augment.randaugment_std=-1.0", ">= 0"]),
        ({"augment__mixup": -1.0}, ["augment.mixup=-1.0", ">= 0"]),
        ({"augment__cutmix": math.inf}, ["augment.cutmix=inf"]),
        ({"augment__mix_prob": 2.0}, ["augment.mix_prob=2.0", "<= 1"]),
        ({"augment__mix_switch_prob": math.nan}, ["augment.mix_switch_prob=nan"]),
        ({"augment__label_smoothing": 1.0}, ["augment.label_smoothing=1.0", "<= 0.99"]),
        ({"augment__repeats": 0}, ["augment.repeats=0", ">= 1"]),
        ({"data__eval_crop": 1.5}, ["data.eval_crop=1.5", "<= 1"]),
        ({"data__unreadable": "ignore"}, ["data.unreadable=ignore", "fail, quarantine"]),
        ({"schedule__name": "step"}, ["schedule.name=step", "schedule.milestones"]),
        ({"tracking__log_every": 0}, ["tracking.log_every=0", ">= 1"]),
        ({"runtime__seed": 2**31}, ["runtime.seed=2147483648", "<= 2147483647"]),
        ({"runtime__precision": "bf8"}, ["runtime.precision=bf8", "'bf16'"]),
        ({"resume": "a", "init": "b"}, ["resume", "init", "only one of the two"]),
        (
            {"model__name": "timm", "model__variant": "test_vit", "model__args": {"pretrained": "a"}, "init": "b"},
            ["init and model.args.pretrained", "only one of the two"],
        ),
        ({"resume": "a", "run_dir": "b"}, ["resume=a continues the run in its own folder", "run_dir=b"]),
        ({"resume": "auto"}, ["resume=auto", "run_dir=FOLDER"]),
        ({"runtime__compile": "block"}, ["runtime.compile=block", "'blocks'", "auto, blocks, model, false"]),
        ({"init_head": "new"}, ["init_head=new", "init="]),
        ({"init_head": "fresh", "init": "a"}, ["init_head=fresh", "strict, new"]),
    ],
    ids=lambda value: " ".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else "",
)
def test_invalid_values_are_explained(changes, fragments):
    with pytest.raises(UserError) as error:
        validate(changed(**changes))
    for fragment in fragments:
        assert fragment in str(error.value)
    assert len(str(error.value).splitlines()) <= 10


@pytest.mark.parametrize(
    "changes",
    [
        {"resume": "auto", "init": "a", "run_dir": "b"},  # the same command starts and resumes a run
        {"engine__batch_size": 48, "engine__micro_batch_size": 16},
        {"engine__eval_split": "val", "data__val_fraction": 0.1},
        {"data__image_size": [32, 64]},
        {"data__mean": None},
        {"optim__weight_decay": 0.0},
        {"runtime__compile": True},
        {"runtime__compile": "Blocks"},
    ],
)
def test_valid_values_are_accepted(changes):
    validate(changed(**changes))


def bounded() -> list[tuple[str, Any]]:
    names = ("least", "above", "most", "below")
    return [
        (key, item)
        for key, item, value in knobs(RunConfig())
        if "list" not in str(item.type) and any(item.metadata[name] is not None for name in names)
    ]


@given(st.sampled_from(bounded()), st.one_of(st.integers(-3, 600), st.floats(-2, 2, allow_nan=False)))
def test_bounds_are_exact(knob, value):
    key, item = knob
    rule = item.metadata
    inside = (
        (rule["least"] is None or value >= rule["least"])
        and (rule["above"] is None or value > rule["above"])
        and (rule["most"] is None or value <= rule["most"])
        and (rule["below"] is None or value < rule["below"])
    )
    config = changed(**{key.replace(".", "__"): value})
    try:
        validate(config)
        found = True
    except UserError as error:
        found = "is out of range" not in str(error)
    assert found == inside
