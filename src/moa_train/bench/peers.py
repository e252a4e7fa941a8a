"""Build models of other libraries, to be compared with the configured model.

The peers of ``--against`` are ``timm/NAME``, ``torchvision/NAME`` and ``moa-train/OPTION``, where OPTION belongs to the
group ``model``. Models of other libraries take arguments:
``timm/swin_tiny_patch4_window7_224:img_size=32,depths=(2,2,6,2)``.
"""

import ast
from typing import Any

import torch
from torch import nn

from moa_train.runtime.errors import UserError, choose, nearest
from moa_train.runtime.libraries import require

LIBRARIES = ("timm", "torchvision")


def build_peer(text: str, num_classes: int) -> nn.Module:
    """Build the model of a library, with random weights, on the CPU.

    Raises:
        UserError: the library is not installed or has no such model, or the arguments cannot be parsed.
    """
    library, _, rest = text.partition("/")
    name, _, arguments = rest.partition(":")
    need(library)
    given = {"num_classes": num_classes, **read_arguments(text, arguments)}
    if library == "timm":
        import timm

        if not timm.is_model(name):
            raise UserError(f"timm has no model {name!r}.{nearest(name, timm.list_models())}")
        model: nn.Module = timm.create_model(name, **given)
    else:
        from torchvision import models

        if name not in models.list_models():
            raise UserError(f"torchvision has no model {name!r}.{nearest(name, models.list_models())}")
        model = models.get_model(name, weights=None, **given)
    return model


def need(library: str) -> None:
    """Raise `UserError` unless ``library`` is in LIBRARIES and installed."""
    if library not in LIBRARIES:
        raise UserError(choose("--against", library, ("moa-train", *LIBRARIES)))
    require(f"--against {library}", [library], "bench")


def read_arguments(text: str, arguments: str) -> dict[str, Any]:
    """Parse ``key=value,key=value``, where the values are Python literals."""
    try:
        call = ast.parse(f"peer({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError("not of the form key=value")
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise UserError(
            f"Cannot parse the arguments in {text}. Write NAME:key=value,key=value with values as in Python, such as "
            "NAME:img_size=32,depths=(2,2,6,2)."
        ) from None


def check_peer(text: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Build a peer, run it on the meta device, which costs nothing, and return it on this device.

    Raises:
        UserError: as in `build_peer`, or the model rejects the arguments or the image size.
    """
    try:
        model = build_peer(text, num_classes).to("meta").eval()
        with torch.no_grad():
            model(torch.empty(1, 3, *image_size, device="meta"))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--against {text} does not work for images of {image_size[0]} x {image_size[1]}: {error}\nGive "
            "arguments after a colon: timm/swin_tiny_patch4_window7_224:img_size=32,patch_size=1,window_size=4"
        ) from error
    return model
