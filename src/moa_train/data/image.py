"""Image files: from bytes to uint8 pixels, for every supported format and color mode.

Files are not trusted. Pillow passes some formats to other programs (PostScript to Ghostscript) or to handlers that
other packages register. Images are therefore identified by their content, and opened only if their format is decoded
in this process. This is the only module that opens image files.
"""

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from moa_train.data import watch
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are decoded in this process. JPEG 2000, WebP and AVIF require a Pillow built with them."""

MAX_REDUCTION = 8  # the JPEG decoder can return images up to this factor smaller

_MAX_SCANS = 30  # of a progressive JPEG of maximum size: each scan takes a pass over all pixels
_STRIP = 1 << 20  # pixels copied at a time
_BYTES_PER_PIXEL = 8  # of an uncompressed file: 4 channels of 16 bits
_TILE_WIDTH, _TILE_LENGTH, _PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 322, 323, 262, 258, 339  # TIFF tags

_opening = threading.Lock()  # Pillow's limit belongs to the process; a thread must not restore another one's None
os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_opening.release)


@dataclass(frozen=True)
class Decoding:
    """Decoding settings.

    Attributes:
        max_pixels: images with more pixels are rejected before their pixels are decoded.
        max_seconds: longest time to decode an image; the process that started the worker process enforces it.
        value_range: values of black and white in gray images of more than 8 bits. The default is the range of the
            unsigned integer type; images whose range is unknown (floating point, 32 bits, signed) are then rejected.
    """

    max_pixels: int = DataConfig.max_pixels
    max_seconds: float = DataConfig.max_seconds
    value_range: tuple[float, ...] | None = None

    @classmethod
    def of(cls, config: DataConfig) -> "Decoding":
        """Return the settings of a configuration."""
        return cls(config.max_pixels, config.max_seconds, None if config.range is None else tuple(config.range))

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise UserError(f"max_pixels={self.max_pixels}: must be at least 1. Default: 100000000.")
        if not self.max_seconds > 0:
            raise UserError(f"max_seconds={self.max_seconds}: must be above 0. Default: 60.")
        levels = self.value_range
        if levels is not None and not (len(levels) == 2 and -np.inf < levels[0] < levels[1] < np.inf):
            raise UserError(f"range={list(levels)}: must be two numbers, LOW < HIGH, for example [0,1].")


class EncodedImage:
    """An image whose header has been read but whose pixels have not been decoded.

    Pixels are those of Pillow's ``convert("RGB")``, except that gray images of more than 8 bits are scaled to 8 bits
    instead of clipped. Only the first frame of an animation is decoded. Orientation tags are ignored, as is usual for
    common data sets.

    Attributes:
        height: in pixels.
        width: in pixels.
    """

    def __init__(self, data: bytes, decoding: Decoding | None = None) -> None:
        self._decoding = decoding or Decoding()
        self._data, file = data, io.BytesIO(data)
        if size := _webp_size(data):  # opening the file would already allocate all of its pixels, twice
            self._check_pixels(*size)
        self._image = open_image(file)
        self.width, self.height = self._image.size
        self._check_limits(file.tell())

    @classmethod
    def of(cls, path: Path, decoding: Decoding | None = None) -> "EncodedImage":
        """Read a file and its header."""
        decoding = decoding or Decoding()
        with path.open("rb") as file:
            status, most = os.fstat(file.fileno()), (1 << 20) + _BYTES_PER_PIXEL * decoding.max_pixels
            if stat.S_ISCHR(status.st_mode) or status.st_size > most:  # a device may never end
                raise UserError(f"a device, or a file larger than {_too_many(decoding)} allows")
            data = file.read(most if stat.S_ISFIFO(status.st_mode) else status.st_size)
        watch.decoding()
        return cls(data, decoding)

    def decode(self, reduction: int = 1) -> Tensor:
        """Return uint8 pixels, 3 H W in channels-last memory format.

        Args:
            reduction: a power of two. To save time, the sides of a JPEG may be reduced by up to this factor.
        """
        pixels_HWC = None
        if self._image.format == "JPEG":
            if reduction > 1:
                self._image.draft("RGB", (self.width // reduction, self.height // reduction))
            elif self._image.mode in ("RGB", "L"):
                pixels_HWC = _decode_jpeg(self._data, self.height, self.width)
        if pixels_HWC is None:
            pixels_HWC = _copy(_to_rgb(self._image, self._decoding.value_range))
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1)

    def _check_limits(self, header_end: int) -> None:
        tags, pixels = _tags(self._image), self.width * self.height
        self._check_pixels(self.width, self.height)
        self._check_pixels(tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0))
        if self._image.format in ("JPEG", "MPO") and not self._has_one_scan(header_end):
            scans = self._data.count(b"\xff\xda")
            if scans * pixels > _MAX_SCANS * self._decoding.max_pixels:
                raise UserError(f"{scans} scans of {pixels:,} pixels would take too long to decode")

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self._decoding.max_pixels:
            raise UserError(f"{width} x {height} pixels are more than {_too_many(self._decoding)}")

    def _has_one_scan(self, header_end: int) -> bool:
        """Return whether the first scan of a JPEG, after the header, is sequential and has all components."""
        channels = len(self._image.getbands())
        start = b"\xff\xda" + (6 + 2 * channels).to_bytes(2, "big") + bytes([channels])
        return "progressive" not in self._image.info and self._data.startswith(start, header_end - 2 * channels - 8)


class DecodedImage(EncodedImage):
    """An image whose pixels are in memory: uint8, 3 H W."""

    def __init__(self, pixels_CHW: Tensor) -> None:
        self._pixels_CHW = pixels_CHW
        self.height, self.width = pixels_CHW.shape[1:]

    @classmethod
    def of_pillow(cls, image: Image.Image, decoding: Decoding | None = None) -> "DecodedImage":
        """Convert a Pillow image like the image of a file."""
        decoding = decoding or Decoding()
        if image.width * image.height > decoding.max_pixels:
            raise UserError(f"{image.width} x {image.height} pixels are more than {_too_many(decoding)}")
        return cls(torch.from_numpy(_copy(_to_rgb(image, decoding.value_range))).permute(2, 0, 1))

    def decode(self, reduction: int = 1) -> Tensor:
        """Return the pixels."""
        return self._pixels_CHW


def open_image(file: IO[bytes]) -> Image.Image:
    """Open a file with Pillow if its content has one of ``FORMATS``.

    Raises:
        UnidentifiedImageError: the file has none of these formats.
    """
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Decoding.max_pixels is the limit instead
        try:
            return Image.open(file, formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height in the header of a WebP file, or None if ``data`` has another format."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind, header = data[12:16], data[20:30]
    if kind == b"VP8X":  # extended: animations, transparency, metadata
        return 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    if kind == b"VP8L":  # lossless
        bits = int.from_bytes(header[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(header[6:8], "little") & 0x3FFF, int.from_bytes(header[8:10], "little") & 0x3FFF


def _too_many(decoding: Decoding) -> str:
    return f"data.max_pixels={decoding.max_pixels} (moa-data: --max-pixels, moa-predict: max_pixels)"


def _tags(image: Image.Image) -> Any:
    return image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]


def _decode_jpeg(data: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """Return the same pixels as Pillow, a third faster, or None if Pillow has to decode the file.

    Pillow decodes the file if simplejpeg is not installed or the file has errors. Pillow determines which files with
    errors are readable.
    """
    if (simplejpeg := _simplejpeg()) is None:
        return None
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


@cache
def _simplejpeg() -> Any:
    try:
        return import_module("simplejpeg")
    except ImportError:
        return None


def _to_rgb(image: Image.Image, value_range: tuple[float, ...] | None) -> Image.Image:
    tags = _tags(image)
    if image.mode[0] in "IF":
        return Image.fromarray(_to_8_bits(image, tags, value_range)).convert("RGB")
    if set(tags.get(_SAMPLE_FORMAT, ())) - {1, 4}:  # Pillow would read these as unsigned
        raise UserError("signed 8-bit values are not supported; convert them to unsigned values")
    if image.mode == "RGB":
        image.load()
        return image  # convert would copy it
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise, Pillow would warn
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, tags: Any, value_range: tuple[float, ...] | None) -> NDArray[np.uint8]:
    """Return the gray levels of an image of mode I or F, scaled to 0..255."""
    values = np.asarray(image)
    if value_range:
        low, high = value_range
        values = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low)) + np.float32(0.5)
        if not np.isfinite(values).all():
            raise UserError("some of its values are infinite or not a number")
        result = values.clip(0, 255).astype(np.uint8)
    elif image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise UserError(
            f"the range of its {kind} values is not known. Set the values of black and white: data.range=[LOW,HIGH], "
            "for example [0,1] (moa-data: --range LOW HIGH, moa-predict: range)"
        )
    else:
        white = (1 << tags.get(_BITS, (16,))[0]) - 1
        result = (values.clip(0, white).astype(np.uint32) * 255 // white).astype(np.uint8)
    return 255 - result if tags.get(_PHOTOMETRIC) == 0 else result  # 0: white is zero


def _copy(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image, copied in strips, because one copy would take three times the memory."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return np.array(image)
    pixels_HWC = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels_HWC[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels_HWC


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert every error that occurs while ``path`` is read to a UserError that names the file.

    Until the end of the block, `FileWatch` shows that this process reads the file.
    """
    try:
        with watch.reading_file(path):
            yield
    except Exception as error:  # decoders raise various errors: OSError, SyntaxError, struct.error
        if isinstance(error, UnidentifiedImageError):
            reason = f"not a valid file of a supported format: {', '.join(FORMATS)}"
        else:
            reason = str(error).partition("\n")[0] or type(error).__name__
        message = f"unreadable image ({reason}). Repair or remove it; `moa-data check ROOT` lists all such files."
        # File names may not be valid UTF-8, but messages are written to UTF-8 files.
        raise UserError(f"{path}: {message}".encode(errors="backslashreplace").decode()) from error
