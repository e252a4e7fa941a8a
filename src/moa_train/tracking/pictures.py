"""Pictures for loggers: grids of images with captions, and confusion matrices. Drawn by Pillow."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from moa_train.runtime.text import printable

_SIDE, _LINE, _GAP = 112, 13, 2
_NAMED = 30
"""Classes up to which a confusion matrix has names and numbers."""


def image_grid(images: Tensor, captions: Sequence[str] = ()) -> Tensor:
    """Arrange up to 64 images (uint8, B C H W) in rows of 8 on white, 2 pixels apart; return uint8, C height width.

    With captions, small images are enlarged, and each has its caption, one or more lines, below it.
    """
    images = images[:64].detach().cpu()
    if captions:
        images = _captioned(images, captions[: len(images)])
    columns = min(8, len(images))
    empty = -len(images) % columns
    x_BCHW = torch.cat([images, images.new_full((empty, *images.shape[1:]), 255)])
    x_BCHW = pad(x_BCHW, (0, _GAP, 0, _GAP), value=255)
    _, channels, height, width = x_BCHW.shape
    x_RKCHW = x_BCHW.reshape(-1, columns, channels, height, width)
    grid = x_RKCHW.permute(2, 0, 3, 1, 4).reshape(channels, -1, columns * width)
    return pad(grid, (_GAP, 0, _GAP, 0), value=255)


def _captioned(images: Tensor, captions: Sequence[str]) -> Tensor:
    from PIL import Image, ImageDraw

    factor = max(1, -(-_SIDE // images.shape[3]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3).expand(-1, 3, -1, -1)
    lines = max(caption.count("\n") + 1 for caption in captions)
    strips = []
    for caption in captions:
        strip = Image.new("RGB", (images.shape[3], lines * _LINE + 2), "white")
        draw = ImageDraw.Draw(strip)
        for row, line in enumerate(caption.split("\n")):
            draw.text((1, row * _LINE), _fitting(printable(line), strip.width - 2), fill="black", font=_font())
        strips.append(torch.from_numpy(np.array(strip)).permute(2, 0, 1))
    return torch.cat([images, torch.stack(strips)], dim=2)


def confusion_picture(counts_KK: NDArray[np.int64], classes: Sequence[str]) -> Tensor:
    """Draw a confusion matrix: rows are true classes, columns predicted ones. Return uint8, 3 height width.

    The color is the share of a row on a scale of square roots, so that rare mistakes are visible. The diagonal is blue
    and mistakes are red. Up to 30 classes, names and counts in percent are written.
    """
    from PIL import Image, ImageDraw

    count = len(classes)
    share_KK = counts_KK / np.maximum(1, counts_KK.sum(1, keepdims=True))
    strength_KK1 = np.sqrt(share_KK)[..., None]
    ink = np.where(np.eye(count, dtype=bool)[..., None], [0, 114, 178], [213, 94, 0])  # blue and red of Okabe and Ito
    pixels = np.round(255 + strength_KK1 * (ink - 255)).astype(np.uint8)
    named = count <= _NAMED
    side = 34 if named else max(1, 900 // count)
    matrix = Image.fromarray(pixels).resize((count * side, count * side), Image.Resampling.NEAREST)
    names = [_fitting(printable(name), 130) for name in classes] if named else []
    left = 8 + max((int(_font().getlength(name)) for name in names), default=0)
    picture = Image.new("RGB", (left + matrix.width + 8, _LINE + 18 + left + matrix.height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 3), f"rows: true class, columns: predicted class; {count} classes", fill="black", font=_font())
    top = _LINE + 18 + (left - 8 if named else 0)
    picture.paste(matrix, (left, top))
    draw.rectangle((left - 1, top - 1, left + matrix.width, top + matrix.height), outline="gray")
    for row, name in enumerate(names):
        place = row * side + side // 2
        draw.text((left - 4, top + place), name, fill="black", font=_font(), anchor="rm")
        upright = Image.new("RGB", (left, _LINE + 2), "white")
        ImageDraw.Draw(upright).text((2, 0), name, fill="black", font=_font())
        picture.paste(upright.rotate(90, expand=True), (left + place - 7, top - left - 2))
        for column in range(count):
            if share_KK[row, column] >= 0.005:
                text, fill = f"{100 * share_KK[row, column]:.0f}", "white" if share_KK[row, column] > 0.4 else "black"
                middle = (left + column * side + side // 2, top + place)
                draw.text(middle, text, fill=fill, font=_font(), anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(11)


def _fitting(text: str, width: int) -> str:
    """Return the text, cut so that it fits into ``width`` pixels."""
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
