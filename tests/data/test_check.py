from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa_train.data.check import check
from moa_train.data.pack import write_pack
from moa_train.runtime.errors import UserError


@pytest.fixture
def root(make_tree: Callable[..., Path]) -> Path:
    return make_tree(splits=("train", "val", "test"), suffix=".png", per_class=3)


def test_a_sound_tree_is_clean(root: Path) -> None:
    report = check(root)
    assert report.clean
    assert report.images == {"train": 9, "val": 9, "test": 9}


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_wrong_is_found(root: Path, workers: int) -> None:
    train, test = root / "train", root / "test"
    (train / "ant" / "001.png").write_bytes(b"no image")
    (train / "ant" / "notes.txt").write_text("")
    Image.open(train / "bee" / "000.png").save(train / "cat" / "copy.bmp")  # other bytes, the same pixels
    Image.open(train / "cat" / "002.png").save(test / "cat" / "leak.png", compress_level=1)
    report = check(root, workers)
    assert not report.clean
    assert [message.split(":")[0] for message in report.unreadable] == [str(train / "ant" / "001.png")]
    assert report.duplicates == [[str(train / "bee" / "000.png"), str(train / "cat" / "copy.bmp")]]
    assert report.leaks == [[str(train / "cat" / "002.png"), str(test / "cat" / "leak.png")]]
    assert report.conflicts == report.duplicates
    assert report.ignored["train"] == 1


def test_a_single_tree(root: Path) -> None:
    report = check(root / "train")
    assert report.images == {"train": 9}


def test_packs_are_verified_and_compared(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    images[4] = images[1]
    write_pack(tmp_path, "train", images, np.arange(6) % 2, ["a", "b"])
    write_pack(tmp_path, "test", images[2:3], np.zeros(1, np.int64), ["a", "b"])
    report = check(tmp_path)
    name = tmp_path.name
    assert report.duplicates == [[f"{name}/train/1", f"{name}/train/4"]]
    assert report.leaks == [[f"{name}/train/2", f"{name}/test/0"]]
    assert report.conflicts == report.duplicates
    data = bytearray((tmp_path / "pack-train.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "pack-train.npy").write_bytes(data)
    with pytest.raises(UserError, match="SHA-256"):
        check(tmp_path)


def test_classes_that_differ_are_an_error(root: Path) -> None:
    (root / "test" / "bee").rename(root / "test" / "wasp")
    with pytest.raises(UserError, match="different classes"):
        check(root)
