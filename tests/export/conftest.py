"""Fixtures for exports: a function that runs one, and exported files of a tiny trained model."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moa_train.schema import ExportConfig


@pytest.fixture(scope="session")
def learned(train, tmp_path_factory) -> Path:
    """The folder of a run that has learned something: about nine tenths of its answers are right."""
    run_dir = tmp_path_factory.mktemp("learned") / "run"
    changes = {
        "optim__lr": "0.02",
        "optim__lr_scaling": "none",
        "schedule__duration": "150 steps",
        "engine__eval_every": "75 steps",
        "engine__save_every": "75 steps",
        "model__conv": "[stem,block]",
        "model__stem_blocks": "1",
    }
    assert train(run_dir, data__limit="null", augment__mixup="0", **changes) == 0
    return run_dir


@pytest.fixture(scope="session")
def export() -> Callable[..., dict[str, Any]]:
    """A function that exports in this process and returns the report: it takes the settings of moa-export."""
    from moa_train.export.job import export as run
    from moa_train.runtime.seed import set_deterministic

    def go(**settings: Any) -> dict[str, Any]:
        texts = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        try:
            return run(ExportConfig(**{"threads": 1, **texts}), io.StringIO())
        finally:
            set_deterministic(False)
            torch.set_num_threads(1)

    return go


@pytest.fixture(scope="session")
def exported(learned, export, tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A function that returns the file of a format, exported from this model, and its report."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def get(form: str) -> tuple[Path, dict[str, Any]]:
        if form not in done:
            path = folder / form
            done[form] = path, export(ckpt=learned, format=form, output=path, **SETTINGS.get(form, {}))
        return done[form]

    return get


SETTINGS = {
    "int8": {"calibration": 32, "max_drop": 5.0, "rounds": 5},
    "hub": {"license": "mit"},
}


@pytest.fixture(scope="session")
def best(learned) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of the model's best EMA weights."""
    with safe_open(learned / "checkpoints" / "best" / "ema.safetensors", "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata()


@pytest.fixture(scope="session")
def logged(learned) -> dict[str, Any]:
    """The result on the test split that the training itself logged."""
    return json.loads((learned / "result.json").read_text())["test"]
