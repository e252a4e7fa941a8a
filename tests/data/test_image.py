import io
import struct
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moa_train.data.image import Decoding, EncodedImage, open_image, reading
from moa_train.runtime.errors import UserError


@pytest.fixture(params=["pillow", "simplejpeg"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with the optional decoder and without."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    else:
        monkeypatch.setattr("moa_train.data.image._simplejpeg", lambda: None)


def encode(image: Image.Image, format: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def with_pillow(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(640, 427), (33, 57), (8, 8), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_as_pillow_does(photographs: list[Image.Image], size: tuple[int, int], mode: str) -> None:
    data = encode(photographs[0].resize(size).convert(mode), "JPEG", quality=87)
    image = EncodedImage(data)
    assert (image.width, image.height) == size
    assert torch.equal(image.decode(), with_pillow(data))


def test_large_images_are_copied_in_strips(peak: Callable[..., float]) -> None:
    """In 7 bytes a pixel: 4 of Pillow's and 3 of the result; at once, there would be 13."""
    values = np.random.default_rng(0).integers(0, 256, (2311, 2503, 3), dtype=np.uint8)
    data = encode(Image.fromarray(values), "PNG", compress_level=0)
    assert np.array_equal(EncodedImage(data).decode().permute(1, 2, 0).numpy(), values)
    assert peak(lambda: EncodedImage(data).decode()) < 10 * values.size / 3 / 2**20


def test_progressive_jpegs_too(photographs: list[Image.Image]) -> None:
    data = encode(photographs[1], "JPEG", progressive=True, subsampling=2)
    assert torch.equal(EncodedImage(data).decode(), with_pillow(data))


@pytest.mark.parametrize(
    ("mode", "format"), [("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("LA", "PNG")]
)
@pytest.mark.parametrize("size", [(40, 30)])
def test_color_modes(photographs: list[Image.Image], mode: str, format: str, size: tuple[int, int]) -> None:
    data = encode(photographs[0].resize(size).convert(mode), format)
    pixels = EncodedImage(data).decode()
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, with_pillow(data))


def test_palettes_with_transparency_give_no_warning(photographs: list[Image.Image]) -> None:
    palette = photographs[0].resize((40, 30)).quantize(16)
    opaque = EncodedImage(encode(palette, "PNG")).decode()
    assert torch.equal(EncodedImage(encode(palette, "PNG", transparency=bytes(range(16)))).decode(), opaque)
    assert torch.equal(EncodedImage(encode(palette, "GIF", transparency=3)).decode(), opaque)


def test_of_a_moving_gif_the_first_picture_counts(photographs: list[Image.Image]) -> None:
    pictures = [photograph.resize((40, 30)).quantize(64) for photograph in photographs]
    data = encode(pictures[0], "GIF", save_all=True, append_images=pictures[1:])
    assert torch.equal(EncodedImage(data).decode(), with_pillow(encode(pictures[0], "PNG")))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    pixels = EncodedImage(encode(Image.fromarray(values), "PNG")).decode()
    assert np.array_equal(pixels[1].numpy(), values // 257)


def gray_tiff(bits: int, values: bytes, *, photometric: int = 1, sample_format: int = 1) -> bytes:
    """Return an uncompressed TIFF of 4 x 1 pixels."""
    entries = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 279: len(values)}
    entries[339] = sample_format
    table = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, entries[tag]) for tag in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(values)) + values
    return head + struct.pack("<H", len(entries)) + table + bytes(4)


def decode(data: bytes, *value_range: float) -> list[list[int]]:
    decoding = Decoding(value_range=(value_range[0], value_range[1]) if value_range else None)
    return EncodedImage(data, decoding).decode()[0].tolist()


LEVELS = np.array([[0, 64, 128, 255]], np.uint8)
UNKNOWN = {  # ranges: of images that show LEVELS if their values are in that range
    "float": (encode(Image.fromarray((LEVELS / 255).astype(np.float32)), "TIFF"), (0, 1)),
    "float, larger": (encode(Image.fromarray(LEVELS * np.float32(2) - 255), "TIFF"), (-255, 255)),
    "pfm": (encode(Image.fromarray((LEVELS / 255).astype(np.float32)), "PPM"), (0, 1)),
    "32 bits": (encode(Image.fromarray(LEVELS.astype(np.int32) * 1000), "TIFF"), (0, 255_000)),
    "signed": (gray_tiff(16, (LEVELS.astype("<i2") - 128).tobytes(), sample_format=2), (-128, 127)),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_values_without_a_known_range_need_one(kind: str) -> None:
    data, value_range = UNKNOWN[kind]
    with pytest.raises(UserError, match=r"range of its .* values is not known\. .*data\.range=\[LOW,HIGH\]"):
        decode(data)
    assert decode(data, *value_range) == LEVELS.tolist()
    low, high = value_range
    assert decode(data, low - 2 * (high - low), low - (high - low)) == [[255] * 4]  # clipped
    assert decode(data, low, low + 2 * (high - low)) == [[0, 32, 64, 128]]


def test_values_of_a_known_range_are_scaled() -> None:
    deep = LEVELS.astype(np.uint16) * 257
    for format in ("PNG", "TIFF", "PPM", "JPEG2000"):
        assert decode(encode(Image.fromarray(deep), format)) == LEVELS.tolist(), format
    twelve_bits = -(-LEVELS.astype(int) * 4095 // 255)
    assert decode(b"P5 4 1 4095\n" + twelve_bits.astype(">u2").tobytes()) == LEVELS.tolist()
    assert decode(gray_tiff(12, bytes.fromhex("000 404 808 fff".replace(" ", "")))) == LEVELS.tolist()
    assert decode(gray_tiff(16, deep.tobytes(), photometric=0)) == (255 - LEVELS).tolist()
    assert decode(gray_tiff(8, LEVELS.tobytes(), photometric=0)) == (255 - LEVELS).tolist()
    color = Image.fromarray(np.stack([LEVELS] * 3, -1))
    assert decode(encode(color, "PNG"), 0, 1) == LEVELS.tolist()  # a range is for more than 8 bits
    microscope = encode(Image.fromarray(LEVELS.astype(np.uint16) * 16), "PNG")  # 12 bits in 16
    assert max(decode(microscope)[0]) == 15
    assert decode(microscope, 0, 4080) == LEVELS.tolist()


def test_values_that_cannot_be_scaled_are_errors() -> None:
    with pytest.raises(UserError, match="infinite or not a number"):
        decode(encode(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"), 0, 1)
    with pytest.raises(UserError, match="signed 8-bit"):
        decode(gray_tiff(8, bytes(4), sample_format=2))
    for value_range in ((1, 1), (1, 0), (0, np.inf), (np.nan, 1)):
        with pytest.raises(UserError, match=r"range=\[.*LOW < HIGH"):
            Decoding(value_range=value_range)


def test_orientation_tags_are_not_applied(photographs: list[Image.Image]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    assert EncodedImage(encode(photographs[0], "JPEG", exif=exif.tobytes())).decode().shape == (3, 427, 640)


@pytest.mark.parametrize(("reduction", "shape"), [(1, (424, 640)), (2, (212, 320)), (8, (53, 80))])
def test_jpegs_can_be_decoded_smaller(photographs: list[Image.Image], reduction: int, shape: tuple[int, int]) -> None:
    photograph = photographs[0].crop((0, 0, 640, 424))  # whole blocks of a JPEG
    pixels = EncodedImage(encode(photograph, "JPEG", quality=95)).decode(reduction)
    assert pixels.shape[1:] == shape
    expected = np.array(photograph.reduce(reduction)).astype(float)
    assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).mean() < 5


def damaged(photograph: Image.Image) -> dict[str, bytes]:
    jpeg, png = encode(photograph, "JPEG"), encode(photograph, "PNG")
    return {
        "empty": b"",
        "text": b"not an image\n" * 10,
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "a jpeg without its end": jpeg[:-200],
        "half a png": png[: len(png) // 2],
        "a png with a flipped bit": png[:-100] + bytes([png[-100] ^ 1]) + png[-99:],
        "a header alone": jpeg[:300],
    }


@pytest.mark.parametrize("what", list(damaged(Image.radial_gradient("L"))))
def test_damaged_files_are_named(what: str, photographs: list[Image.Image], tmp_path: Path) -> None:
    path = tmp_path / "some image.jpg"
    path.write_bytes(damaged(photographs[0])[what])
    with pytest.raises(UserError, match=r"some image\.jpg: unreadable image \(.+\)\. .*moa-data check"), reading(path):
        EncodedImage(path.read_bytes()).decode()


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_decompression_bombs_are_refused_before_they_take_memory(side: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match=r"pixels are more than data\.max_pixels=100000000"), reading(path):
        EncodedImage(path.read_bytes())


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"), reading(tmp_path / "none.jpg"):
        EncodedImage((tmp_path / "none.jpg").read_bytes())


def test_the_limit_of_pillow_survives_threads(photographs: list[Image.Image]) -> None:
    """It belongs to the process. The second thread must not take the None of the first one for the limit."""
    data, limit = encode(photographs[0], "PNG"), Image.MAX_IMAGE_PIXELS
    first, second, finished = threading.Event(), threading.Event(), threading.Event()

    class First(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if not first.is_set():
                first.set()
                second.wait(0.3)  # in vain if the second thread waits for this one
            return super().read(size)

    class Second(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            second.set()
            finished.wait()
            return super().read(size)

    other = threading.Thread(target=lambda: first.wait() and open_image(Second(data)))
    other.start()
    open_image(First(data))
    finished.set()
    other.join()
    assert limit == Image.MAX_IMAGE_PIXELS
