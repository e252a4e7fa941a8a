"""Image files: from bytes to uint8 pixels, whatever the format and colour mode."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from moa_train.runtime.errors import UserError

MAX_REDUCTION = 8  # of a JPEG decoder that leaves out high frequencies


class EncodedImage:
    """An image whose header has been read and whose pixels have not.

    Pixels are what Pillow's ``convert("RGB")`` makes of them, except that 16-bit grey is scaled to 8 bits instead of
    clipped. Orientation tags are not applied, as is the field's habit with these data sets.

    Attributes:
        height: in pixels.
        width: in pixels.
    """

    def __init__(self, data: bytes) -> None:
        with warnings.catch_warnings():  # half of Pillow's limit for decompression bombs only warns; refuse it too
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._image = Image.open(io.BytesIO(data))
        self._data = data
        self.width, self.height = self._image.size

    def decode(self, reduction: int = 1) -> Tensor:
        """Return uint8 pixels, 3 H W in the memory format of channels last.

        Args:
            reduction: the sides may be up to this power of two smaller; JPEGs are decoded faster like that.
        """
        pixels_HWC = None
        if self._image.format == "JPEG":
            if reduction > 1:
                self._image.draft("RGB", (self.width // reduction, self.height // reduction))
            elif self._image.mode in ("RGB", "L"):
                pixels_HWC = _decode_jpeg(self._data)
        if pixels_HWC is None:
            pixels_HWC = np.array(_to_rgb(self._image))
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Return the pixels that Pillow would give, a third faster, or None if Pillow must be asked.

    That is where simplejpeg is not installed, and for files that it finds fault with: Pillow draws the line between
    blemished and unreadable.
    """
    if (simplejpeg := _simplejpeg()) is None:
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


@cache
def _simplejpeg() -> Any:
    try:
        return import_module("simplejpeg")
    except ImportError:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without this step Pillow warns
    return image.convert("RGB")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while ``path`` is read into a UserError that names it."""
    try:
        yield
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
        raise UserError(
            f"{path}: unreadable image ({reason or type(error).__name__}). Repair or remove it; "
            "`moa-data check ROOT` lists all such files."
        ) from error
