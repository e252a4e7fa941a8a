"""The model."""

from typing import Any

from torch import nn

from moa_train.model import create_model
from moa_train.schema import DataConfig, ModelConfig, image_shape


def model_fields(config: ModelConfig, data: DataConfig, num_classes: int) -> dict[str, Any]:
    """Return the arguments of ``create_model`` and ``check_model``."""
    return {
        "image_size": image_shape(data.image_size),
        "num_classes": num_classes,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depths": tuple(config.depths),
        "heads": tuple(config.heads),
        "window": config.window,
        "mlp_ratio": config.mlp_ratio,
        "dropout": config.dropout,
        "drop_path": config.drop_path,
        "checkpointing": config.checkpointing,
        "moa_enabled": config.moa.enabled,
        "moa_form": config.moa.form,
        "moa_overlap": config.moa.overlap,
        "moa_reduction": config.moa.reduction,
        "moa_drop_path": config.moa.drop_path,
    }


def build_model(config: ModelConfig, data: DataConfig, num_classes: int) -> nn.Module:
    """Build the model, freshly initialised, on the CPU."""
    return create_model(config.name, **model_fields(config, data, num_classes))
