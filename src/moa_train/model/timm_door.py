"""Models from timm, built for the image size of the data set and without network access.

The ``timm`` extra installs the library, which is imported only if one of its models is used.
"""

import functools
import json
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_train.interfaces import Classifier
from moa_train.knobs import fill, knob
from moa_train.model.pth_file import read_state_dict
from moa_train.runtime.errors import UserError, nearest
from moa_train.runtime.libraries import require
from moa_train.schema import ModelConfig

RESERVED = {"num_classes", "in_chans", "img_size", "drop_rate", "drop_path_rate", "features_only", "checkpoint_path"}
"""Arguments of timm.create_model that other settings determine."""


@dataclass
class TimmArgs:
    """Settings of timm's models: ``model.args.KEY=VALUE``."""

    pretrained: str | None = knob(
        None,
        "local file with weights to start from, .safetensors or .pth; a classifier of another size is reinitialized",
    )
    kwargs: dict[str, Any] = knob({}, "additional arguments of the model's class in timm: {depths:[2,2],embed_dim:48}")


class TimmModel(Classifier):
    """timm's model ``config.variant``, held in the submodule ``net``.

    The image size, ``config.drop_path`` (timm's ``drop_path_rate``), ``config.dropout`` (timm's ``drop_rate``) and
    ``config.checkpointing`` apply to it. All other settings of the architecture are timm's defaults.
    """

    def __init__(self, config: ModelConfig, *, image_size: tuple[int, int], num_classes: int, args: TimmArgs) -> None:
        super().__init__()
        self.variant, self.pretrained = config.variant, args.pretrained
        self.arguments = {**supported_arguments(config, args, image_size), "num_classes": num_classes}
        self.net = create(self.variant, self.arguments)
        self.net.set_grad_checkpointing(config.checkpointing)
        heads = self.net.get_classifier()  # distilled models have two
        self.heads = [
            f"net.{name}"
            for name, module in self.net.named_modules()
            if any(module is head for head in (heads if isinstance(heads, list | tuple) else [heads]))
        ]
        if not self.heads:
            raise UserError(f"model.variant={config.variant} is not a classifier. Choose another timm model.")
        self.head_name = self.heads[0]
        stages = getattr(self.net, "feature_info", None) if hasattr(self.net, "forward_intermediates") else None
        self.stages = [f"net.{stage['module']}" for stage in stages or []]

    @staticmethod
    def check(config: ModelConfig, image_size: tuple[int, int]) -> None:
        """Raise `UserError` if timm has no such model or the model does not support these settings or image size."""
        supported_arguments(config, fill(TimmArgs, config.args, "model.args"), image_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        logits_BK: Tensor = self.net(images_BCHW)
        return logits_BK

    def forward_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the feature map (B, C, H, W) of every stage, or of every block if the model has no stages."""
        if not self.stages:
            return super().forward_features(images_BCHW)
        maps: list[Tensor] = self.net.forward_intermediates(images_BCHW, intermediates_only=True)
        return maps

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm exempts from weight decay."""
        patterns = self.net.no_weight_decay() if hasattr(self.net, "no_weight_decay") else ()
        names = [name for name, _ in self.net.named_parameters()]
        return {f"net.{name}" for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}

    @property
    def head_names(self) -> list[str]:
        """Names of all classifiers."""
        return self.heads

    def layer_ids(self) -> dict[str, int]:
        """Return timm's own layer number of every parameter."""
        if not hasattr(self.net, "group_matcher"):
            return {}
        from timm.models import group_parameters

        numbers = group_parameters(self.net, self.net.group_matcher(coarse=False), reverse=True)
        return {f"net.{name}": number for name, number in numbers.items()}

    def part_of(self, name: str) -> tuple[int, str]:
        """Return the stage and its name in timm; outside of stages, the name of the outermost module."""
        for stage, module in enumerate(self.stages):
            if name == module or name.startswith(f"{module}."):
                return stage, module.removeprefix("net.")
        return -1, name.removeprefix("net.").split(".")[0]

    def load_pretrained(self) -> None:
        """Load ``args.pretrained``, if set, after timm's own conversion (names, position tables of a different size).

        Raises:
            UserError: the file cannot be read, or anything other than the size of the classifier differs.
        """
        if self.pretrained is None:
            return
        weights, own = read_weights(Path(self.pretrained).expanduser()), self.net.state_dict()
        try:
            self.net.load_state_dict(self._converted(weights, own))
        except Exception as error:  # the conversions of timm raise various exceptions for foreign weights
            raise UserError(
                f"model.args.pretrained={self.pretrained} does not match model.variant={self.variant}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _converted(self, weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's weights as timm converts them, with this model's own classifier if the sizes differ."""
        # timm converts once more below, which changes nothing. Before, the file's head can have another name.
        convert = getattr(sys.modules[type(self.net).__module__], "checkpoint_filter_fn", None)
        weights = dict(convert(weights, self.net)) if convert is not None else weights
        for name, value in own.items():
            if f"net.{name}".startswith(tuple(f"{head}." for head in self.heads)):
                given = weights.get(name)
                if given is None or given.shape != value.shape:
                    weights[name] = value
        source = {"state_dict": weights, "source": "", "label_offset": 0, "num_classes": self.arguments["num_classes"]}
        loaded = create(self.variant, self.arguments, pretrained=True, pretrained_cfg_overlay=source)
        state: dict[str, Tensor] = loaded.state_dict()
        return state


def create(variant: str, arguments: dict[str, Any], **pretrained: Any) -> Any:
    """Call timm's factory, which accesses the network only for pretrained weights that are not passed in."""
    import timm

    return timm.create_model(variant, **arguments, **pretrained)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a .safetensors or .pth file, without executing any code in the file."""
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.args.pretrained={path} cannot be read: {error}") from error
    return weights


def supported_arguments(config: ModelConfig, args: TimmArgs, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments for `create` except ``num_classes``, after testing them on the meta device.

    Raises:
        UserError: timm is not installed, timm has no such model, or the model does not work with these settings.
    """
    require("model.name=timm", ["timm"], "timm")
    for key in args.kwargs:
        if key in RESERVED or key.startswith(("pretrained", "cache")):
            raise UserError(
                f"model.args.kwargs.{key} cannot be set, because the data, model.dropout, model.drop_path "
                "or model.args.pretrained determines it. Remove it."
            )
    wanted = {"img_size": image_size, "drop_rate": config.dropout, "drop_path_rate": config.drop_path}
    taken = _try_out(config.variant, image_size, json.dumps([wanted, args.kwargs]), config.checkpointing)
    for key, setting in (("drop_rate", "dropout"), ("drop_path_rate", "drop_path")):
        if wanted[key] and key not in taken:
            raise UserError(f"model.{setting}={wanted[key]}: timm's {config.variant} does not support it; set it to 0.")
    return {**{key: wanted[key] for key in taken}, **args.kwargs}


@functools.cache
def _try_out(variant: str, image_size: tuple[int, int], settings: str, checkpointing: bool) -> list[str]:
    """Build the model on the meta device, run it on one image, and return the settings that it accepts."""
    import timm

    if not timm.is_model(variant):
        raise UserError(f"model.variant={variant}: timm has no such model.{nearest(variant, timm.list_models())}")
    wanted, kwargs = json.loads(settings)
    height, width = image_size
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        while True:
            try:
                net = create(variant, {**wanted, **kwargs}).eval()
                net(torch.empty(1, 3, height, width))
                break
            except Exception as error:  # timm raises various exceptions for unsupported settings
                refused = [key for key in wanted if "unexpected" in str(error) and re.search(rf"\b{key}\b", str(error))]
                if not refused:
                    raise UserError(
                        f"timm's {variant} does not work with images of {height} x {width} and these settings: "
                        f"{type(error).__name__}: {error}\nChange data.image_size or model.args.kwargs={kwargs}."
                    ) from error
                for key in refused:
                    del wanted[key]
        try:
            net.set_grad_checkpointing(checkpointing)
        except AssertionError as error:
            raise UserError(f"model.checkpointing=true: {variant} does not support it ({error}).") from error
    return list(wanted)
