"""Image files from strangers: none of them starts a program, and none takes more time or memory than its limits."""

import ast
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from moa_train.bench.input_peers import PillowImages
from moa_train.cli.data import main
from moa_train.data.check import check
from moa_train.data.dataset import open_split
from moa_train.data.image import FORMATS, Decoding, EncodedImage, reading
from moa_train.data.loader import EvalLoader, TrainLoader
from moa_train.data.order import Order
from moa_train.data.view import RandomResizedCrop
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig

SOURCE = Path(__file__).parents[2] / "src"
NAMES = ("9.png", "9.jpg", "9.jpeg", "9.jfif", "9.gif", "9.bmp", "9.ppm", "9.webp", "9.tif", "9.PNG")
POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
%%EndComments
(written) (w) file closefile
showpage
"""
BINARY_HEAD = b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, len(POSTSCRIPT), 0, 0, 0, 0) + b"\0\0"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once Ghostscript has been started: the only `gs` on the PATH is a script that writes it."""
    (tmp_path / "bin").mkdir()
    script, log = tmp_path / "bin" / "gs", tmp_path / "started"
    script.write_text(f"#!/bin/sh\necho >> {log}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # look for it again
    return log


def test_the_trap_works(started: Path) -> None:
    """Pillow itself starts the script; otherwise the tests below would prove nothing."""
    with suppress(OSError):
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert started.exists()


@pytest.mark.parametrize("head", [b"", BINARY_HEAD], ids=["text", "binary"])
def test_postscript_is_not_an_image_in_any_command(
    head: bytes, started: Path, make_tree: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_tree(splits=("train", "test"), classes=("ant", "bee"), per_class=1, suffix=".png", size=(32, 32))
    for name in NAMES:
        (root / "train" / "ant" / name).write_bytes(head + POSTSCRIPT)
        (root / "test" / "ant" / name).write_bytes(head + POSTSCRIPT)
    for command in ("check", "stats"):
        with pytest.raises(SystemExit):
            main([command, str(root)])
    with pytest.raises(SystemExit):
        main(["pack", str(root), str(root / "out")])
    assert "9.PNG: unreadable image (not a valid file of a supported format" in capsys.readouterr().err
    assert len(check(root, workers=2).unreadable) == 2 * len(NAMES)

    config = DataConfig(name="folder", root=str(root), image_size=16, unreadable="quarantine")
    train, order, view = (
        open_split(config, "train"),
        Order(12, 12, 0),
        RandomResizedCrop((16, 16), (0.08, 1.0), (3 / 4, 4 / 3)),
    )
    for workers in (0, 1):
        loader = TrainLoader(train, config, order=order, view=view, micro_batch_size=12, workers=workers)
        next(loader.batches())
        assert len(loader.quarantined) == len(NAMES)
        with pytest.raises(UserError, match="supported format"):
            list(EvalLoader(open_split(config, "test"), batch_size=4, workers=workers))
    with pytest.raises(OSError):
        PillowImages(train).open([train.name(row).endswith("9.gif") for row in range(len(train))].index(True))
    assert not started.exists()


def test_only_one_module_opens_images() -> None:
    """Commands to come inherit the list of formats if they cannot open images in another way."""
    openers = {"PIL.Image.open", "torchvision.io", "torchvision.datasets", "cv2"}
    calls = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", "") == "Image":
                calls.add(path.name)
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if openers.intersection(names):
                calls.add(path.name)
    assert calls == {"image.py"}


def others() -> dict[str, bytes]:
    """One file in every other format that Pillow writes or knows by its first bytes."""
    Image.init()
    files = {
        "wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
        "emf": b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60),
        "fits": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(80),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(60),
        "grib": b"GRIB\0\0\0\x01" + bytes(60),
        "bufr": b"BUFR" + bytes(60),
        "psd": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(20),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "mvg": b"push graphic-context\nviewbox 0 0 9 9\nimage over 0,0 0,0 'https://127.0.0.1/x.png'\n",
        "pickle": b"cos\nsystem\n(S'touch exploded'\ntR.",
    }
    for name in set(Image.SAVE) - set(FORMATS) - {"MPO", "DIB", *map(str.upper, files)}:
        file = io.BytesIO()
        with suppress(OSError, ValueError, KeyError), warnings.catch_warnings(action="ignore"):
            Image.radial_gradient("L").convert("1" if name in ("MSP", "XBM") else "RGB").save(file, name)
            files[name] = file.getvalue()
    return files


def test_other_formats_are_refused_by_their_content(tmp_path: Path) -> None:
    files = others()
    assert len(files) > 18
    for name, data in files.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}\.png: unreadable image .* supported format"), reading(path):
            EncodedImage.of(path)


def test_supported_formats_are_read_under_any_name(tmp_path: Path) -> None:
    picture = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    for name in FORMATS:
        path = tmp_path / f"{name}.xyz"
        try:
            picture.save(path, name, quality=95)
        except (OSError, KeyError):
            pytest.skip(f"Pillow was built without {name}")
        pixels = EncodedImage.of(path).decode().permute(1, 2, 0).numpy()
        assert np.abs(pixels.astype(int) - np.asarray(picture)).mean() < 4, name


def refuse(data: bytes, match: str, decoding: Decoding | None = None) -> None:
    with pytest.raises(UserError, match=match), reading(Path("x.png")):
        EncodedImage(data, decoding).decode()


def encoded(image: Image.Image, format: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def tiff(side: int) -> bytes:
    """Return an image of 16 x 16 pixels in one tile of ``side`` x ``side``, nearly all of which is missing."""
    tile = zlib.compress(bytes(1 << 20))
    entries = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + struct.pack("<H", len(entries)) + table + bytes(4)


def test_limits_hold_before_memory_is_taken(peak: Callable[..., float]) -> None:
    image = Image.new("L", (4000, 3000))
    names = ("PNG", "JPEG", "GIF", "TIFF", "JPEG2000")
    bombs = {name: encoded(image, name) for name in names} | {"WEBP": encoded(image, "WEBP", method=0)}
    bombs["lossless"] = encoded(image, "WEBP", method=0, quality=0, lossless=True)
    bombs["extended"] = encoded(image, "WEBP", method=0, exif=b"Exif")
    few = Decoding(max_pixels=11_999_999)
    for name, data in {**bombs, "tile": tiff(20_000), "larger tile": tiff(46_000)}.items():
        assert peak(partial(refuse, data, "pixels are more than data.max_pixels", few)) < 1, name
    # Blocks of a decoder may come from memory that the process already has; some decoders need new memory.
    assert max(peak(EncodedImage(data).decode) for data in bombs.values()) > 30


def test_the_limit_on_pixels_is_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (11_000, 9_900)).save(path)
    with pytest.raises(UserError, match=r"data\.max_pixels=100000000"), reading(path):
        EncodedImage.of(path)
    assert EncodedImage.of(path, Decoding(max_pixels=11_000 * 9_900)).width == 11_000
    with pytest.raises(UserError, match=r"more than data\.max_pixels=49"), reading(path):
        EncodedImage(encoded(Image.new("L", (10, 5)), "PNG"), Decoding(max_pixels=49))


def test_files_that_never_end_are_not_read_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(10 << 30)
    for name in ("zero.png", "sparse.png"):
        with pytest.raises(UserError, match="a device, or a file larger than"), reading(tmp_path / name):
            EncodedImage.of(tmp_path / name)


@pytest.fixture
def slow(make_tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a JPEG of 300 scans, just below the limit, which takes the decoder many seconds."""
    monkeypatch.setattr("moa_train.data.loader._POLL", 0.2)
    monkeypatch.setattr("moa_train.data.watch._POLL", 0.2)
    root = make_tree(splits=("train",), classes=("ant", "bee"), per_class=2)
    data = encoded(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    (root / "train" / "ant" / "000.jpg").write_bytes(data[:-2] + 300 * scan + data[-2:])
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_takes_too_long_ends_a_run(slow: Path, workers: int) -> None:
    config = DataConfig(name="folder", root=str(slow), image_size=16, max_seconds=0.5)
    train, view = open_split(config, "train"), RandomResizedCrop((16, 16), (0.08, 1.0), (3 / 4, 4 / 3))
    loader = TrainLoader(train, config, order=Order(4, 4, 0), view=view, micro_batch_size=4, workers=workers)
    with pytest.raises(UserError, match=r"ant/000.jpg: decoding takes longer than data.max_seconds=0.5"):
        next(loader.batches())


def test_an_image_that_takes_too_long_ends_every_command(slow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["check", str(slow)], ["pack", str(slow), str(slow / "out")], ["stats", str(slow)]):
        with pytest.raises(SystemExit) as exit_:
            main([*words, "--max-seconds", "0.5"])
        assert exit_.value.code == 2
        assert "ant/000.jpg: decoding takes longer than data.max_seconds=0.5" in capsys.readouterr().err


def test_jpegs_of_endless_scans_are_refused() -> None:
    """A scan of a few bytes costs a pass over all pixels, and a file can repeat it without limit."""
    for settings in ({"progressive": True}, {}):
        data = encoded(Image.new("RGB", (3000, 3000)), "JPEG", **settings)
        scan = data[data.rindex(b"\xff\xda") : -2]
        if not settings:  # three scans of one component each, in place of one scan of three
            body = data[data.rindex(b"\xff\xda") + 14 : -2]
            one = [b"\xff\xda\x00\x08\x01" + bytes([c, 0 if c == 1 else 17]) + b"\0\x3f\0" for c in (1, 2, 3)]
            data, scan = data[: data.rindex(b"\xff\xda")] + b"".join(head + body for head in one) + b"\xff\xd9", one[0]
        data = data[:-2] + 1000 * scan + data[-2:]
        refuse(data, r"10\d\d scans of 9,000,000 pixels")
    EncodedImage(encoded(Image.effect_noise((3000, 3000), 50), "JPEG", progressive=True)).decode()
