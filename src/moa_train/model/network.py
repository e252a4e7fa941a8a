"""The MOA-Transformer: its stages are planned, then built in one of its two forms."""

from collections.abc import Iterator

from torch import Tensor, nn

from moa_train.interfaces import Classifier
from moa_train.model.layers import ConvMerging, ConvStem, LocalBlock, LocalStage, PatchEmbedding, PatchMerging
from moa_train.model.moa import MOABlock, MOAStage
from moa_train.model.published_block import PublishedStage
from moa_train.model.stages import StagePlan, plan_stages
from moa_train.schema import ModelConfig


class MOATransformer(Classifier):
    """The whole network: patch embedding, stages with patch merging between them, LayerNorm, mean, linear head.

    Args:
        config: architecture.
        image_size: (height, width) of the images in pixels.
        num_classes: width of the head.

    Raises:
        UserError: these settings do not fit together. No memory has been allocated yet.
    """

    def __init__(self, config: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        stages = plan_stages(config, image_size)
        self.image_size, self.patch_size = image_size, config.patch_size
        self.stages = tuple(stages)
        layers = build_stages(config, stages)
        patch, dim = config.patch_size, stages[0].dim
        is_conv = "stem" in config.conv
        self.patch_embed = ConvStem(patch, dim, config.stem_blocks) if is_conv else PatchEmbedding(patch, dim)
        self.pos_drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(stages[-1].dim)
        self.head = nn.Linear(stages[-1].dim, num_classes)
        self.apply(init_weights)

    @staticmethod
    def check(config: ModelConfig, image_size: tuple[int, int]) -> None:
        """Raise `UserError` if such a model cannot be built; allocate nothing."""
        plan_stages(config, image_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, 3, H, W), of the size the model was built for, to logits (B, num_classes)."""
        for x_BHWC in self.stage_outputs(images_BCHW):
            last_BHWC = x_BHWC  # keep only the last one
        return self.head(last_BHWC.mean((1, 2)))

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return every stage's map (B, C, H, W) before patch merging; the last one is normalized."""
        return [x_BHWC.permute(0, 3, 1, 2) for x_BHWC in self.stage_outputs(images_BCHW)]

    def stage_outputs(self, images_BCHW: Tensor) -> Iterator[Tensor]:
        """Yield the maps of `forward_features` as (B, H, W, C)."""
        assert images_BCHW.shape[2:] == self.image_size, f"built for {self.image_size}, got {images_BCHW.shape}"
        x_BHWC = self.pos_drop(self.patch_embed(images_BCHW))
        for layer in self.layers:
            assert isinstance(layer, LocalStage)
            x_BHWC = layer(x_BHWC)
            yield self.norm(x_BHWC) if layer.downsample is None else x_BHWC
            if layer.downsample is not None:
                x_BHWC = layer.downsample(x_BHWC)

    def no_weight_decay(self) -> set[str]:
        """Return the tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def layer_names(self) -> list[str]:
        """Return the patch embedding, every block, and the rest of every stage but the last (MOA, patch merging)."""
        prefixes = ["patch_embed"]
        for index, stage in enumerate(self.stages):
            prefixes += [f"layers.{index}.blocks.{block}" for block in range(stage.depth)] + [f"layers.{index}"]
        return [*prefixes[:-1], "norm"]

    def part_of(self, name: str) -> tuple[int, str]:
        """Return the stage and the part for the summary."""
        match name.split("."):
            case ["patch_embed", *_]:
                return -1, "embedding"
            case ["layers", index, "blocks", _, "attn" | "norm1", *_]:
                return int(index), "attention"
            case ["layers", index, "blocks", _, "conv", *_]:
                return int(index), "convolution"
            case ["layers", index, "blocks", *_]:
                return int(index), "MLP"
            case ["layers", index, "downsample", *_]:
                return int(index), "merging"
            case ["layers", index, *_]:
                return int(index), "MOA"
        return -1, "head"


def init_weights(module: nn.Module) -> None:
    """Initialize projections from a normal distribution of std 0.02, and their biases with zeros."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_stages(config: ModelConfig, stages: list[StagePlan]) -> list[LocalStage]:
    """Build every stage, with drop path rates that rise linearly from block to block."""
    local_rates = iter(ramp(config.drop_path, sum(stage.depth for stage in stages)))
    moa_rates = iter(ramp(config.moa.drop_path, sum(stage.moa for stage in stages)))

    def build_stage(stage: StagePlan) -> LocalStage:
        blocks = [LocalBlock(stage, config, drop_path=next(local_rates)) for _ in range(stage.depth)]
        if stage.moa and config.moa.form == "published":
            return PublishedStage(stage, blocks, config, drop_path=next(moa_rates))
        merging = ConvMerging if "merging" in config.conv else PatchMerging
        downsample = None if stage is stages[-1] else merging(stage.dim)
        if not stage.moa:
            return LocalStage(stage, blocks, downsample, config)
        moa = MOABlock(stage, config, drop_path=next(moa_rates))
        assert downsample is not None, "the last stage has no MOA block"
        return MOAStage(stage, blocks, moa, downsample, config)

    return [build_stage(stage) for stage in stages]


def ramp(highest: float, blocks: int) -> list[float]:
    """Return drop path rates that rise linearly from 0 to ``highest`` over the blocks; a single block gets 0."""
    return [highest * block / max(blocks - 1, 1) for block in range(blocks)]
