import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moa_train.model.registry import create_model
from moa_train.schema import MoaConfig, ModelConfig

torch.set_num_threads(1)  # small models only lose time by waiting for more threads

SMALL = {
    "image_size": (16, 16),
    "num_classes": 5,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "heads": [2, 2],
    "window": 4,
    "moa_reduction": 4,
}
VARIANTS = {
    "paper": {},
    "paper, padded": {"image_size": (18, 21)},
    "paper, convolutions": {"conv": ["stem", "merging", "block", "mlp"], "stem_blocks": 1},
    "published": {"moa_form": "published"},
    "window only": {"moa_enabled": False},
    "swin": {"name": "swin"},
    "vit": {"name": "vit", "depths": [2], "heads": [2], "patch_size": 4},
    "resnet": {"name": "resnet", "depths": [1, 1, 1, 1], "embed_dim": 64},
}


def configure(**fields: Any) -> ModelConfig:
    moa = {key.removeprefix("moa_"): fields.pop(key) for key in list(fields) if key.startswith("moa_")}
    return ModelConfig(**{"drop_path": 0.0, **fields}, moa=MoaConfig(**moa))


def describe(variant: str = "paper", **changes: Any) -> tuple[ModelConfig, dict[str, Any]]:
    fields = {**SMALL, **VARIANTS[variant], **changes}
    geometry = {key: fields.pop(key) for key in ("image_size", "num_classes")}
    return configure(**fields), geometry


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model_config() -> Callable[..., ModelConfig]:
    """A function from fields to a configuration without drop path: ``model_config(window=7, moa_overlap=2)``."""
    return configure


@pytest.fixture(scope="session")
def small_config() -> Callable[..., tuple[ModelConfig, dict[str, Any]]]:
    """A function that returns the arguments of `create_model` for a small model: ``small_config("vit", window=2)``."""
    return describe


@pytest.fixture(scope="session")
def small() -> Callable[..., nn.Module]:
    """A function that builds a small model: ``small("published", moa_overlap=2)``."""

    def build(variant: str = "paper", **changes: Any) -> nn.Module:
        config, geometry = describe(variant, **changes)
        return create_model(config, **geometry)

    return build


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    """Return each variant in turn."""
    return request.param


class CfgNode(dict):
    """Like the configuration class of the published training code: a dict with attributes, of a foreign module."""

    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__["_frozen"] = True


@pytest.fixture
def published(tmp_path, monkeypatch, small):
    """Files in the authors' layout, in both containers of PyTorch, and the model whose weights they hold."""
    module = types.ModuleType("yacs_config")
    module.CfgNode, CfgNode.__module__ = CfgNode, "yacs_config"
    monkeypatch.setitem(sys.modules, "yacs_config", module)
    model = small("published").eval()
    config = CfgNode({"MODEL": CfgNode({"NAME": "moa_tiny", "DROP_PATH_RATE": 0.2}), "AMP": True})
    paths = {}
    for zipped in (True, False):
        paths[zipped] = tmp_path / f"{zipped}.pth"
        content = {"model": model.state_dict(), "max_accuracy": 80.5, "epoch": 299, "config": config}
        torch.save(content, paths[zipped], _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs_config")
    return paths, model
