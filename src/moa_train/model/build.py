"""From settings to a MOA-Transformer: the stages are planned, then built in the form that is asked for."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from moa_train.model.geometry import Stage, plan_stages
from moa_train.model.layers import LocalBlock, PatchMerging
from moa_train.model.moa import MOABlock, MOAStage, MOATransformer
from moa_train.model.released import ReleasedStage


def build_moa(
    *,
    image_size: tuple[int, int],
    num_classes: int,
    in_channels: int,
    patch_size: int,
    embed_dim: int,
    depths: Sequence[int],
    heads: Sequence[int],
    window: int,
    mlp_ratio: float,
    drop_path: float,
    dropout: float,
    checkpointing: bool,
    moa_enabled: bool,
    moa_form: str,
    moa_overlap: int,
    moa_reduction: int,
    moa_drop_path: float,
) -> MOATransformer:
    """Build the network; the fields are those of `create_model`, which documents them."""
    stages = plan_stages(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depths=depths,
        heads=heads,
        window=window,
        moa_enabled=moa_enabled,
        moa_form=moa_form,
        moa_overlap=moa_overlap,
        moa_reduction=moa_reduction,
    )
    local_rates = iter(ramp(drop_path, sum(stage.depth for stage in stages)))
    moa_rates = iter(ramp(moa_drop_path, sum(stage.moa for stage in stages)))

    def build_stage(stage: Stage) -> nn.Module:
        blocks = [
            LocalBlock(
                stage.dim,
                stage.heads,
                stage.map_size,
                stage.window,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                drop_path=next(local_rates),
                keep_index=moa_form == "released",
            )
            for _ in range(stage.depth)
        ]
        thin = {"overlap": moa_overlap, "reduction": moa_reduction}
        downsample = None if stage is stages[-1] else PatchMerging(stage.dim)
        if not stage.moa:
            return MOAStage(blocks, None, downsample)
        if moa_form == "released":
            return ReleasedStage(stage, blocks, **thin, dropout=dropout, drop_path=next(moa_rates))
        moa = MOABlock(stage, **thin, mlp_ratio=mlp_ratio, dropout=dropout, drop_path=next(moa_rates))
        return MOAStage(blocks, moa, downsample)

    return MOATransformer(
        [build_stage(stage) for stage in stages],
        stages,
        image_size=image_size,
        in_channels=in_channels,
        patch_size=patch_size,
        num_classes=num_classes,
        dropout=dropout,
        checkpointing=checkpointing,
    )


def ramp(highest: float, blocks: int) -> list[float]:
    """Return stochastic depth rates that grow linearly from 0 to ``highest`` over the blocks; a single one gets 0."""
    return torch.linspace(0, highest, blocks).tolist()
