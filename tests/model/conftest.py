from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moa_train.model import create_model

torch.set_num_threads(1)  # of small models, more threads only wait for each other

SMALL = {
    "image_size": (16, 16),
    "num_classes": 5,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (1, 1),
    "heads": (2, 2),
    "window": 4,
    "moa_reduction": 4,
}
VARIANTS = {
    "paper": ("moa", {}),
    "paper, padded": ("moa", {"image_size": (18, 21)}),
    "released": ("moa", {"moa_form": "released"}),
    "window only": ("moa", {"moa_enabled": False}),
    "swin": ("swin", {}),
    "vit": ("vit", {"depths": (2,), "heads": (2,), "patch_size": 4}),
    "resnet": ("resnet", {"depths": (1, 1, 1, 1), "embed_dim": 64}),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def settings_of() -> Callable[..., tuple[str, dict[str, Any]]]:
    """Return the name and the fields of a small model: ``settings_of("released", moa_overlap=2)``."""

    def choose(variant: str = "paper", **changes: Any) -> tuple[str, dict[str, Any]]:
        name, fields = VARIANTS[variant]
        return name, {**SMALL, **fields, **changes}

    return choose


@pytest.fixture
def small(settings_of: Callable[..., tuple[str, dict[str, Any]]]) -> Callable[..., nn.Module]:
    """Return a builder of small models: ``small("released", moa_overlap=2)``."""

    def build(variant: str = "paper", **changes: Any) -> nn.Module:
        name, fields = settings_of(variant, **changes)
        return create_model(name, **fields)

    return build


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    """Every variant of every model in turn."""
    return request.param
