"""Checkpoints in the layout that the authors of MOA publish: deriving the architecture, and writing.

Such a file is a pickle ``{"model": state dict, ...}``, which `pth_file.read_state_dict` reads. Names and shapes are
those of the published form in this package, so no tensor needs conversion.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_flushed
from moa_train.schema import MoaConfig, ModelConfig


@dataclass(frozen=True)
class PublishedModel:
    """The architecture that published weights belong to."""

    config: ModelConfig
    image_size: tuple[int, int]
    num_classes: int


def published_model(weights: Mapping[str, Tensor], image_size: tuple[int, int] | None = None) -> PublishedModel:
    """Derive the architecture from a published state dict.

    Args:
        weights: the state dict.
        image_size: (height, width); required only if the weights have no global attention, which determines it.

    Raises:
        UserError: these are not the weights of a published MOA-Transformer.
    """
    try:
        return _model_of(weights, image_size)
    except KeyError as error:
        raise UserError(f"These are not the weights of a published MOA-Transformer: there is no {error}.") from None


def write_published(path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a state dict of the published form, and ``config``, which holds plain values only, in the published layout.

    Raises:
        UserError: the weights belong to another model or form, which has no published layout.
        OSError: the file cannot be written.
    """
    foreign = [name for name in weights if not _PUBLISHED.fullmatch(name)]
    if foreign:
        raise UserError(
            "Only weights of model.moa.form=published can be written in the published layout, which has no entries "
            f"for {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}."
        )
    content = {"model": {name: value.detach().cpu().clone() for name, value in weights.items()}, "config": dict(config)}
    file = io.BytesIO()
    torch.save(content, file)  # into memory, because torch reports a full disk as an internal error
    write_flushed(path, file.getvalue())


_BLOCK = (
    r"norm[12]\.(weight|bias)|attn\.relative_position_(bias_table|index)|(attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)
_GLOBAL = (
    r"glb_attn\.(relative_position_(bias_table|index)|(pre_conv|q|kv|proj)\.(weight|bias))|post_conv\.(weight|bias)"
)
_PUBLISHED = re.compile(
    r"patch_embed\.(proj|norm)\.(weight|bias)|(norm|head)\.(weight|bias)"
    rf"|layers\.\d+\.(blocks\.\d+\.({_BLOCK})|{_GLOBAL}|norm[12]\.(weight|bias)"
    r"|downsample\.(reduction\.weight|norm\.(weight|bias)))"
)


def _model_of(weights: Mapping[str, Tensor], image_size: tuple[int, int] | None) -> PublishedModel:
    embedding = weights["patch_embed.proj.weight"]
    patch, dim = embedding.shape[2], embedding.shape[0]
    if embedding.shape[1] != 3:
        raise UserError(f"These weights are for images of {embedding.shape[1]} channels; only 3 are supported.")
    blocks = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.weight", name) for name in weights]
    counts = [(int(found[1]), int(found[2])) for found in blocks if found]
    stages = range(1 + max((stage for stage, _ in counts), default=0))
    tables = [weights[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in stages]
    window = (math.isqrt(len(tables[0])) + 1) // 2
    config = ModelConfig(
        variant="published",
        patch_size=patch,
        embed_dim=dim,
        depths=[1 + max(block for of, block in counts if of == stage) for stage in stages],
        heads=[table.shape[1] for table in tables],
        window=window,
        mlp_ratio=weights["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        drop_path=0.0,
        moa=MoaConfig(enabled="layers.0.glb_attn.q.weight" in weights, form="published"),
    )
    if config.moa.enabled:
        thin = weights["layers.0.glb_attn.pre_conv.weight"].shape[0]
        kernel = math.isqrt(weights["layers.0.glb_attn.kv.weight"].shape[1] // thin)
        config.moa.reduction = 32 if dim // 32 == thin else dim // thin
        config.moa.overlap = (kernel - window) // 2
        side = (math.isqrt(len(weights["layers.0.glb_attn.relative_position_bias_table"])) + 1) // 2 * window * patch
        image_size = image_size or (side, side)
    if image_size is None:
        raise UserError("Without global attention, the weights do not determine the image size. Give --image-size.")
    return PublishedModel(config, image_size, weights["head.weight"].shape[0])
