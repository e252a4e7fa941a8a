"""Models to compare with: torchvision's Swin, ViT and ResNet, at any geometry and with the calls of the others.

Each is torchvision's own class; what is added is ``forward_features``, activation checkpointing and, for small
images, the usual stem. Differences in accuracy are then differences of models, not of code around them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, SwinTransformer, VisionTransformer
from torchvision.models.resnet import Bottleneck

from moa_train.model.layers import run_block


class Swin(SwinTransformer):
    """Swin Transformer (arXiv 2103.14030): windows that shift from block to block."""

    head_name = "head"

    def __init__(
        self,
        *,
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
    ) -> None:
        super().__init__(
            patch_size=[patch_size, patch_size],
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(heads),
            window_size=[window, window],
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
        )
        self.checkpointing = checkpointing
        if in_channels != 3:
            self.features[0][0] = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        return self.head(self.forward_features(images_BCHW)[-1].mean((2, 3)))

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return every stage's map (B, C, H, W), the last one after the LayerNorm."""
        x_BHWC, maps = self.features[0](images_BCHW), []
        for layer in self.features[1:]:
            if isinstance(layer, nn.Sequential):  # a stage; what stands between them is patch merging
                for block in layer:
                    x_BHWC = run_block(block, x_BHWC, recompute=self.checkpointing and self.training)
                maps.append(x_BHWC)
            else:
                x_BHWC = layer(x_BHWC)
        maps[-1] = self.norm(maps[-1])
        return [map_BHWC.permute(0, 3, 1, 2) for map_BHWC in maps]


class ViT(VisionTransformer):
    """Vision Transformer (arXiv 2010.11929): global attention among all patches and a class token."""

    head_name = "heads.head"

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        num_classes: int,
        in_channels: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        checkpointing: bool,
    ) -> None:
        super().__init__(
            image_size=image_size[0],
            patch_size=patch_size,
            num_layers=depth,
            num_heads=heads,
            hidden_dim=embed_dim,
            mlp_dim=int(embed_dim * mlp_ratio),
            dropout=dropout,
            num_classes=num_classes,
        )
        self.checkpointing = checkpointing
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        if in_channels != 3:
            self.conv_proj = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)
        if image_size[0] != image_size[1]:
            table_1LC = torch.empty(1, self.grid[0] * self.grid[1] + 1, embed_dim)
            self.encoder.pos_embedding = nn.Parameter(table_1LC.normal_(std=0.02))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
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


class BottleneckResNet(ResNet):
    """ResNet (arXiv 1512.03385) of bottleneck blocks.

    ``stem`` 4 is the one for photographs (7x7 convolution and pooling, each of stride 2), 2 leaves the pooling out,
    and 1 is the one for images of 32 pixels: a 3x3 convolution without stride.
    """

    head_name = "fc"

    def __init__(
        self, *, num_classes: int, in_channels: int, stem: int, depths: Sequence[int], checkpointing: bool
    ) -> None:
        super().__init__(Bottleneck, list(depths), num_classes=num_classes)
        self.checkpointing = checkpointing
        kernel = 7 if stem == 4 else 3
        self.conv1 = nn.Conv2d(in_channels, 64, kernel, stride=min(stem, 2), padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem != 4:
            self.maxpool = nn.Identity()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
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
