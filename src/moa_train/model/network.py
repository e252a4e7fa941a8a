"""The whole MOA-Transformer, and how settings become one: the stages are planned, then built in either form."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from moa_train.model.geometry import Stage, plan_stages
from moa_train.model.layers import LocalBlock, LocalStage, PatchEmbedding, PatchMerging
from moa_train.model.moa import MOABlock, MOAStage
from moa_train.model.released import ReleasedStage


class MOATransformer(nn.Module):
    """The whole network: patch embedding, stages with patch merging between them, LayerNorm, mean, linear head."""

    head_name = "head"

    def __init__(
        self,
        layers: Sequence[LocalStage],
        stages: Sequence[Stage],
        *,
        image_size: tuple[int, int],
        in_channels: int,
        patch_size: int,
        num_classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.stages = tuple(stages)
        self.patch_embed = PatchEmbedding(patch_size, in_channels, stages[0].dim)
        self.pos_drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(stages[-1].dim)
        self.head = nn.Linear(stages[-1].dim, num_classes)
        self.apply(init_weights)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W), of the size the model was built for, to logits (B, num_classes)."""
        for x_BHWC in self.stage_outputs(images_BCHW):
            last_BHWC = x_BHWC  # the others are not kept
        return self.head(last_BHWC.mean((1, 2)))

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return every stage's map (B, C, H, W), as it goes into patch merging; the last one after the LayerNorm."""
        return [x_BHWC.permute(0, 3, 1, 2) for x_BHWC in self.stage_outputs(images_BCHW)]

    def stage_outputs(self, images_BCHW: Tensor) -> Iterator[Tensor]:
        """Yield what `forward_features` returns, as (B, H, W, C)."""
        assert images_BCHW.shape[2:] == self.image_size, f"built for {self.image_size}, got {images_BCHW.shape}"
        x_BHWC = self.pos_drop(self.patch_embed(images_BCHW))
        for layer in self.layers:
            assert isinstance(layer, LocalStage)
            x_BHWC = layer(x_BHWC)
            yield self.norm(x_BHWC) if layer.downsample is None else x_BHWC
            if layer.downsample is not None:
                x_BHWC = layer.downsample(x_BHWC)


def init_weights(module: nn.Module) -> None:
    """Draw projections from a normal of deviation 0.02, set their biases to 0; LayerNorm starts as the identity."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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

    def build_stage(stage: Stage) -> LocalStage:
        blocks = [
            LocalBlock(
                stage.dim,
                stage.heads,
                stage.map_size,
                stage.window,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                drop_path=next(local_rates),
                published_layout=moa_form == "released",
            )
            for _ in range(stage.depth)
        ]
        thin = {"overlap": moa_overlap, "reduction": moa_reduction}
        if stage.moa and moa_form == "released":
            return ReleasedStage(
                stage, blocks, **thin, dropout=dropout, drop_path=next(moa_rates), checkpointing=checkpointing
            )
        downsample = None if stage is stages[-1] else PatchMerging(stage.dim)
        if not stage.moa:
            return LocalStage(stage, blocks, downsample, checkpointing=checkpointing)
        moa = MOABlock(stage, **thin, mlp_ratio=mlp_ratio, dropout=dropout, drop_path=next(moa_rates))
        assert downsample is not None, "the last stage has no MOA block"
        return MOAStage(stage, blocks, moa, downsample, checkpointing=checkpointing)

    return MOATransformer(
        [build_stage(stage) for stage in stages],
        stages,
        image_size=image_size,
        in_channels=in_channels,
        patch_size=patch_size,
        num_classes=num_classes,
        dropout=dropout,
    )


def ramp(highest: float, blocks: int) -> list[float]:
    """Return stochastic depth rates that grow linearly from 0 to ``highest`` over the blocks; a single one gets 0."""
    return [highest * block / max(blocks - 1, 1) for block in range(blocks)]
