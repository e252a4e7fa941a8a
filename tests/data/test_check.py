import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa_train.data.check import check
from moa_train.data.image import Decoding
from moa_train.data.pack import pack_tree, write_pack
from moa_train.data.tree import scan
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


def test_images_without_contrast_are_named(root: Path) -> None:
    levels = np.linspace(0, 4095, 60 * 50).astype(np.uint16).reshape(50, 60)
    Image.fromarray(levels).save(root / "train" / "ant" / "microscope.png")  # 12 bits in 16
    Image.new("RGB", (60, 50), "white").save(root / "val" / "bee" / "blank.png")
    report = check(root)
    assert report.flat == [f"{root}/train/ant/microscope.png", f"{root}/val/bee/blank.png"]
    assert not report.clean
    assert check(root, decoding=Decoding(value_range=(0, 4095))).flat == report.flat[1:]


def test_links_that_lead_nowhere_are_shown(root: Path) -> None:
    (root / "train" / "ant" / "more").symlink_to("/nowhere/ants")
    (root / "val" / "bee" / "up").symlink_to("..")
    report = check(root)
    assert report.broken == [f"{root}/train/ant/more", f"{root}/val/bee/up"]
    assert (report.ignored["train"], report.ignored["val"], report.clean) == (1, 1, False)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_links_with_the_suffix_of_an_image_are_shown_once(root: Path, workers: int) -> None:
    for split in ("train", "val", "test"):
        pack(root, split, root)
    image, circle = root / "train" / "ant" / "001.png", root / "val" / "bee" / "000.png"
    for path, target in {image: "/nowhere/001.png", circle: circle.name}.items():
        path.unlink()
        path.symlink_to(target)
    (root / "test" / "cat" / "002.png").write_bytes(b"no image")
    report = check(root, workers)
    assert report.broken == [str(image), str(circle)]
    assert [message.split(":")[0] for message in report.unreadable] == [f"{root}/test/cat/002.png"]
    assert (report.stale, report.clean, sum(report.ignored.values())) == ([], False, 0)


def pack(root: Path, split: str, out: Path) -> None:
    pack_tree(scan(root / split), out, split)


def test_a_pack_is_compared_with_its_files(root: Path) -> None:
    for split in ("train", "val"):
        pack(root, split, root)
    assert check(root).clean
    path = root / "val" / "bee" / "001.png"
    path.write_bytes((root / "train" / "cat" / "000.png").read_bytes())
    report = check(root)
    assert report.stale == [str(path)]
    assert report.leaks == [[f"{root}/train/cat/000.png", str(path)]]
    (root / "train" / "cat" / "002.png").unlink()
    with pytest.raises(UserError, match=r"pack-train\.json was not created from the files .*1 removed: cat/002\.png"):
        check(root)


def test_splits_in_another_spelling_and_other_trees_are_refused(root: Path) -> None:
    (root / "val").rename(root / "valid")
    with pytest.raises(UserError, match="valid: a folder of this name is not read"):
        check(root)
    (root / "valid").rename(root / "train" / "valid")
    for name in ("ant", "bee", "cat"):
        (root / "train" / name).rename(root / name)
    with pytest.raises(UserError, match="look like splits"):
        check(root)


def test_classes_that_differ_are_an_error(root: Path) -> None:
    (root / "test" / "bee").rename(root / "test" / "wasp")
    with pytest.raises(UserError, match="different classes"):
        check(root)


def test_classes_of_packs_are_compared_too(root: Path, tmp_path: Path, make_tree: Callable[..., Path]) -> None:
    pack(root, "train", tmp_path / "out")
    other = make_tree(splits=("val", "test"), classes=("ant", "bee", "dog"), suffix=".png", name="other")
    (other / "val").rename(tmp_path / "out" / "val")
    with pytest.raises(UserError, match="different classes: only in train: cat; only in val: dog"):
        check(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "val")
    pack(other, "test", tmp_path / "out")
    with pytest.raises(UserError, match="different classes: only in train: cat; only in test: dog"):
        check(tmp_path / "out")
