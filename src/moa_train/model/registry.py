"""Models by name: checked, then built."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from moa_train.model import geometry
from moa_train.model.network import build_moa
from moa_train.runtime.errors import UserError, choose


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
    """Build a freshly initialised model that maps images (B, in_channels, H, W) to logits (B, num_classes).

    ``model.forward_features(images)`` returns every stage's map (B, C, H, W), for uses as a backbone.

    Args:
        name: moa, or a baseline: swin, vit (of one "stage": ``depths[0]``, ``heads[0]``) or resnet (of bottleneck
            blocks; ``heads``, ``window`` and ``mlp_ratio`` mean nothing to it).
        image_size: (height, width) in pixels.
        num_classes: width of the head.
        in_channels: channels of the images.
        patch_size: side of a patch in pixels; of resnet the stem: 4 for photographs, 1 or 2 for small images.
        embed_dim: channels of the first stage.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: side of a window in positions.
        mlp_ratio: width of an MLP's hidden layer over its input's.
        drop_path: stochastic depth of the last local block, a linear ramp from 0.
        dropout: dropout after the embedding, attention and both layers of an MLP.
        checkpointing: recompute each block's activations in the backward pass.
        moa_enabled: whether MOA blocks stand between the stages; the ``moa_`` fields are read by ``name="moa"`` only.
        moa_form: "paper" or "released", see docs/MODEL.md.
        moa_overlap: positions a side by which keys and values reach into the neighbouring windows.
        moa_reduction: the MOA block works on C / R channels.
        moa_drop_path: stochastic depth of the last MOA block, a linear ramp from 0.

    Raises:
        UserError: these settings cannot be built; nothing has been allocated yet.
    """
    fields: dict[str, Any] = {key: value for key, value in locals().items() if key != "name"}
    fields["image_size"] = (image_size[0], image_size[1])
    check_model(name, **fields)
    return _BUILDERS[name](fields)


def check_model(name: str, **fields: Any) -> None:
    """Raise `UserError` where `create_model` with these fields could not build; cheap, allocates nothing."""
    if name not in _BUILDERS:
        raise UserError(choose("model.name", name, _BUILDERS))
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(create_model).parameters.items()
        if parameter.default is not parameter.empty
    }
    geometry.check(name, **{**defaults, **fields})


def _pick(fields: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names.split()}


def _swin(fields: dict[str, Any]) -> nn.Module:
    from moa_train.model.baselines import Swin

    names = "num_classes in_channels patch_size embed_dim depths heads window mlp_ratio drop_path dropout checkpointing"
    return Swin(**_pick(fields, names))


def _vit(fields: dict[str, Any]) -> nn.Module:
    from moa_train.model.baselines import ViT

    names = "image_size num_classes in_channels patch_size embed_dim mlp_ratio dropout checkpointing"
    return ViT(depth=fields["depths"][0], heads=fields["heads"][0], **_pick(fields, names))


def _resnet(fields: dict[str, Any]) -> nn.Module:
    from moa_train.model.baselines import BottleneckResNet

    return BottleneckResNet(stem=fields["patch_size"], **_pick(fields, "num_classes in_channels depths checkpointing"))


# torchvision's models are imported by the functions that need them: it doubles the time of the import.
_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "moa": lambda fields: build_moa(**fields),
    "swin": _swin,
    "vit": _vit,
    "resnet": _resnet,
}
