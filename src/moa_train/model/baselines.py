"""Baselines: torchvision's Swin, ViT and ResNet, at any image size.

The classes are torchvision's own. This module adds ``forward_features``, activation checkpointing, the description of
the parameters and the usual stem for small images, so that differences in accuracy come from the models alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, SwinTransformer, VisionTransformer
from torchvision.models.resnet import Bottleneck

from moa_train.interfaces import Classifier
from moa_train.model.layers import run_block
from moa_train.model.stages import check_heads, check_lists, check_mlp, check_patches
from moa_train.runtime.errors import UserError
from moa_train.schema import ModelConfig


class Swin(Classifier, SwinTransformer):
    """Swin Transformer (arXiv 2103.14030): windows that are shifted in every other block."""

    features: Any  # torchvision's attributes, which have no types
    norm: Any
    head: Any

    def __init__(self, config: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> None:
        super().__init__(
            patch_size=[config.patch_size, config.patch_size],
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.heads),
            window_size=[config.window, config.window],
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            stochastic_depth_prob=config.drop_path,
            num_classes=num_classes,
        )
        self.depths, self.checkpointing = list(config.depths), config.checkpointing

    @staticmethod
    def check(config: ModelConfig, image_size: tuple[int, int]) -> None:
        """Raise `UserError` if such a model cannot be built."""
        check_patches(image_size, config.patch_size, "swin")
        check_lists(config.depths, config.heads)
        check_mlp(config)
        if sum(config.depths) == 1:
            raise UserError("depths=[1]: torchvision's Swin needs at least two blocks. Use depths=[2] or more stages.")
        for index, heads in enumerate(config.heads):
            check_heads(f"Stage {index}", config.embed_dim * 2**index, heads)

    def no_weight_decay(self) -> set[str]:
        """Return the tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def layer_names(self) -> list[str]:
        """Return the patch embedding, every block and every patch merging."""
        prefixes = ["features.0"]
        for stage, depth in enumerate(self.depths):
            prefixes += [f"features.{2 * stage + 1}.{block}" for block in range(depth)] + [f"features.{2 * stage + 2}"]
        return [*prefixes[:-1], "norm"]

    def part_of(self, name: str) -> tuple[int, str]:
        """Return the stage and the part for the summary."""
        match name.split("."):
            case ["features", "0", *_]:
                return -1, "embedding"
            case ["features", number, *rest] if int(number) % 2:
                return (int(number) - 1) // 2, "attention" if {"attn", "norm1"} & set(rest) else "MLP"
            case ["features", number, *_]:
                return (int(number) - 1) // 2, "merging"
        return -1, "head"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        return self.head(self.forward_features(images_BCHW)[-1].mean((2, 3)))

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return every stage's map (B, C, H, W); the last one is normalized."""
        x_BHWC, maps = self.features[0](images_BCHW), []
        for layer in self.features[1:]:
            if isinstance(layer, nn.Sequential):  # a stage; the other layers are patch merging
                for block in layer:
                    x_BHWC = run_block(block, x_BHWC, recompute=self.checkpointing and self.training)
                maps.append(x_BHWC)
            else:
                x_BHWC = layer(x_BHWC)
        maps[-1] = self.norm(maps[-1])
        return [map_BHWC.permute(0, 3, 1, 2) for map_BHWC in maps]


class ViT(Classifier, VisionTransformer):
    """Vision Transformer (arXiv 2010.11929): global attention among all patches and a class token."""

    head_name = "heads.head"
    conv_proj: Any
    class_token: Any
    encoder: Any
    heads: Any

    def __init__(self, config: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> None:
        patch_size, dim = config.patch_size, config.embed_dim
        super().__init__(
            image_size=image_size[0],
            patch_size=patch_size,
            num_layers=config.depths[0],
            num_heads=config.heads[0],
            hidden_dim=dim,
            mlp_dim=int(dim * config.mlp_ratio),
            dropout=config.dropout,
            num_classes=num_classes,
        )
        self.checkpointing = config.checkpointing
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        if image_size[0] != image_size[1]:
            table_1LC = torch.empty(1, self.grid[0] * self.grid[1] + 1, dim)
            self.encoder.pos_embedding = nn.Parameter(table_1LC.normal_(std=0.02))

    @staticmethod
    def check(config: ModelConfig, image_size: tuple[int, int]) -> None:
        """Raise `UserError` if such a model cannot be built."""
        check_patches(image_size, config.patch_size, "vit")
        check_lists(config.depths, config.heads)
        check_mlp(config)
        if len(config.depths) != 1:
            raise UserError(f"model.name=vit has one stage: depths={config.depths} must have one entry, such as [12].")
        check_heads("vit", config.embed_dim, config.heads[0])
        if config.drop_path:
            raise UserError(f"drop_path={config.drop_path}: torchvision's ViT has no stochastic depth; set it to 0.")

    def no_weight_decay(self) -> set[str]:
        """Return the class token and the position table."""
        return {"class_token", "encoder.pos_embedding"}

    def layer_names(self) -> list[str]:
        """Return the patch embedding and every block."""
        blocks = [f"encoder.layers.encoder_layer_{number}" for number in range(len(self.encoder.layers))]
        return ["conv_proj", *blocks, "encoder.ln"]

    def part_of(self, name: str) -> tuple[int, str]:
        """Return the stage and the part for the summary."""
        match name.split("."):
            case ["encoder", "layers", _, *rest]:
                return 0, "attention" if {"self_attention", "ln_1"} & set(rest) else "MLP"
            case ["conv_proj" | "class_token", *_] | ["encoder", "pos_embedding"]:
                return -1, "embedding"
        return -1, "head"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        return self.heads(self.tokens(images_BCHW)[:, 0])

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return one map (B, C, H, W): the patch tokens after the last LayerNorm."""
        return [self.tokens(images_BCHW)[:, 1:].transpose(1, 2).unflatten(2, self.grid)]

    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """Return the encoder's tokens (B, 1 + H W, C), the class token first."""
        patches_BLC = self.conv_proj(images_BCHW).flatten(2).transpose(1, 2)
        x_BLC = torch.cat([self.class_token.expand(patches_BLC.shape[0], -1, -1), patches_BLC], dim=1)
        x_BLC = self.encoder.dropout(x_BLC + self.encoder.pos_embedding)
        for block in self.encoder.layers:
            x_BLC = run_block(block, x_BLC, recompute=self.checkpointing and self.training)
        return self.encoder.ln(x_BLC)


class BottleneckResNet(Classifier, ResNet):
    """ResNet (arXiv 1512.03385) of bottleneck blocks.

    ``patch_size`` 4 selects the stem for photographs (7x7 convolution and pooling, each of stride 2), 2 omits the
    pooling, and 1 is the stem for images of 32 pixels: a 3x3 convolution without stride. ``embed_dim`` is the number of
    channels after the stem, 64 in the paper.
    """

    head_name = "fc"
    relu: Any
    layer1: Any
    layer2: Any
    layer3: Any
    layer4: Any
    _make_layer: Any

    def __init__(self, config: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> None:
        super().__init__(Bottleneck, list(config.depths), num_classes=num_classes)
        self.checkpointing = config.checkpointing
        stem, width = config.patch_size, config.embed_dim
        kernel = 7 if stem == 4 else 3
        self.conv1 = nn.Conv2d(3, width, kernel, stride=min(stem, 2), padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem != 4:
            self.maxpool = nn.Identity()
        if width != 64:  # torchvision builds only this width
            self.bn1, self.inplanes = nn.BatchNorm2d(width), width
            for stage, depth in enumerate(config.depths):
                planes, stride = width * 2**stage, min(stage + 1, 2)
                setattr(self, f"layer{stage + 1}", self._make_layer(Bottleneck, planes, depth, stride))
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            self.fc = nn.Linear(self.inplanes, num_classes)

    @staticmethod
    def check(config: ModelConfig, image_size: tuple[int, int]) -> None:
        """Raise `UserError` if such a model cannot be built."""
        if config.patch_size not in (1, 2, 4):
            raise UserError(f"patch_size={config.patch_size}: resnet has stems for 1, 2 (small images) and 4.")
        if len(config.depths) != 4:
            raise UserError(f"model.name=resnet has four stages: depths={config.depths} must be like [3,4,6,3].")
        for key in ("drop_path", "dropout"):
            if getattr(config, key):
                raise UserError(f"{key}={getattr(config, key)}: torchvision's ResNet has none; set it to 0.")

    def layer_names(self) -> list[str]:
        """Return the stem and every block."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        blocks = [f"layer{stage}.{block}" for stage, layer in enumerate(stages, 1) for block in range(len(layer))]
        return ["conv1", *blocks]

    def part_of(self, name: str) -> tuple[int, str]:
        """Return the stage and the part for the summary."""
        first = name.split(".")[0]
        if first.startswith("layer"):
            return int(first[-1]) - 1, "convolutions"
        return -1, "head" if first == "fc" else "embedding"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        return self.fc(self.forward_features(images_BCHW)[-1].mean((2, 3)))

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the maps (B, C, H, W) of the four stages."""
        x_BCHW = self.maxpool(self.relu(self.bn1(self.conv1(images_BCHW))))
        maps: list[Tensor] = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x_BCHW = run_block(block, x_BCHW, recompute=self.checkpointing and self.training)
            maps.append(x_BCHW)
        return maps
