"""Models by name."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from moa_train.model.build import build_moa
from moa_train.runtime.errors import UserError, choose

MODELS = ("moa",)


def create_model(
    name: str,
    *,
    image_size: tuple[int, int],
    num_classes: int,
    in_channels: int = 3,
    patch_size: int,
    embed_dim: int,
    depths: Sequence[int],
    heads: Sequence[int],
    window: int,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    checkpointing: bool = False,
    moa_enabled: bool = True,
    moa_form: str = "paper",
    moa_overlap: int = 1,
    moa_reduction: int = 32,
    moa_drop_path: float = 0.2,
) -> nn.Module:
    """Build a model that maps images (B, in_channels, H, W) to logits (B, num_classes).

    Raises:
        UserError: the settings cannot be built; nothing has been allocated yet.
    """
    fields: dict[str, Any] = {key: value for key, value in locals().items() if key != "name"}
    check_model(name, **fields)
    return build_moa(**fields)


def check_model(name: str, **fields: Any) -> None:
    """Raise `UserError` where `create_model` with these settings could not build; cheap, allocates nothing."""
    if name not in MODELS:
        raise UserError(choose("model.name", name, MODELS))
