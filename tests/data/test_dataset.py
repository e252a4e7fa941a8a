from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from moa_train.data.datasets import DATASETS, has_split, open_source
from moa_train.data.pack import write_pack
from moa_train.runtime.errors import UserError

SIZE = (16, 16)


def test_digits_are_scikit_learns_kept_apart() -> None:
    parts = {
        split: open_source("digits", split=split, image_size=(8, 8), val_fraction=0.1)
        for split in ("train", "val", "test")
    }
    assert {split: len(part) for split, part in parts.items()} == {"train": 1295, "val": 143, "test": 359}
    scans = load_digits()
    known = {
        np.round(image * (255 / 16)).astype(np.uint8).tobytes(): label
        for image, label in zip(scans.images, scans.target, strict=True)
    }
    names = set()
    for part in parts.values():
        images = part.gather(np.arange(len(part)))  # type: ignore[union-attr]
        assert all(known[image[0].numpy().tobytes()] == label for image, label in zip(images, part.labels, strict=True))
        assert np.bincount(part.labels).min() >= 0.9 * len(part) / 10  # stratified
        names |= {part.name(row).split("/")[-1] for row in range(len(part))}
    assert len(names) == 1797
    assert parts["train"].classes == [str(digit) for digit in range(10)]


def test_digits_are_enlarged_smoothly() -> None:
    source = open_source("digits", split="test", image_size=(32, 32))
    images = source.gather(np.arange(20))  # type: ignore[union-attr]
    assert images.shape == (20, 3, 32, 32)
    assert (images[:, :1] == images).all()
    native = open_source("digits", split="test", image_size=(8, 8)).gather(np.arange(20))  # type: ignore[union-attr]
    expected = Image.fromarray(native[3, 0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(images[3, 0].numpy().astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_a_folder_tree_is_packed_once(make_tree: Callable[..., Path], name: str) -> None:
    root = make_tree(size=(32, 32), suffix=".png")
    source = open_source(name, split="train", image_size=(32, 32), root=root)
    assert source.in_memory
    first = root / "train" / "ant" / "000.png"
    assert np.array_equal(source.gather(np.array([0]))[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(first)))
    written = (root / "pack-train.npy").stat()
    again = open_source(name, split="train", image_size=(32, 32), root=root)
    assert again.fingerprint == source.fingerprint
    assert (root / "pack-train.npy").stat() == written
    assert not (root / "pack-test.npy").exists()
    (root / "train" / "ant" / "999.png").write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"was not made of the files that are now in"):
        open_source(name, split="train", image_size=(32, 32), root=root)


def test_a_pack_alone_is_enough(tmp_path: Path) -> None:
    images = np.zeros((10, 3, 32, 32), np.uint8)
    for split in ("train", "test"):
        write_pack(tmp_path, split, images, np.arange(10) % 2, ["a", "b"])
    for name in ("cifar10", "folder"):
        assert len(open_source(name, split="test", image_size=SIZE, root=tmp_path)) == 10


def test_imagenets_val_folder_is_the_test_split(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "val"), per_class=5)
    parts = {
        split: open_source("imagenet", split=split, image_size=SIZE, root=root, val_fraction=0.2)
        for split in ("train", "val", "test")
    }
    assert {split: len(part) for split, part in parts.items()} == {"train": 12, "val": 3, "test": 15}
    assert all("/val/" in parts["test"].name(row) for row in range(15))
    held = {parts["val"].name(row) for row in range(3)}
    kept = {parts["train"].name(row) for row in range(12)}
    assert not held & kept
    assert all("/train/" in name for name in held | kept)


@pytest.mark.parametrize(
    ("splits", "fraction", "available"),
    [
        (("train", "val"), 0.0, {"train", "val"}),
        (("train", "test"), 0.0, {"train", "test"}),
        (("train", "test"), 0.25, {"train", "val", "test"}),
        (("train", "val", "test"), 0.0, {"train", "val", "test"}),
        (("train",), 0.25, {"train", "val"}),
        (("train",), 0.0, {"train"}),
    ],
)
def test_a_folder_has_the_splits_it_has(
    make_tree: Callable[..., Path], splits: tuple[str, ...], fraction: float, available: set[str]
) -> None:
    root = make_tree(splits=splits)
    for split in ("train", "val", "test"):
        assert has_split("folder", split, root, fraction) == (split in available)
        if split in available:
            assert len(open_source("folder", split=split, image_size=SIZE, root=root, val_fraction=fraction)) > 0
        else:
            with pytest.raises(UserError, match=r"val_fraction|no such folder"):
                open_source("folder", split=split, image_size=SIZE, root=root, val_fraction=fraction)


@pytest.mark.parametrize("name", DATASETS)
def test_without_a_validation_split_the_error_says_how_to_get_one(name: str, make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "test"), size=(32, 32))
    assert not has_split(name, "val", root)
    with pytest.raises(UserError, match=r"no validation split\. Hold out a part of train, .*val_fraction=0\.1"):
        open_source(name, split="val", image_size=SIZE, root=root)


def test_two_validation_splits_are_one_too_many(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "val"))
    with pytest.raises(UserError, match=r"val_fraction=0\.1, but .* has a validation split of its own"):
        open_source("folder", split="val", image_size=SIZE, root=root, val_fraction=0.1)
    with pytest.raises(UserError, match=r"val_fraction=0\.1, but"):
        open_source("folder", split="train", image_size=SIZE, root=root, val_fraction=0.1)


def test_splits_need_the_same_classes(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "val", "test"), size=(32, 32))
    (root / "val" / "bee").rename(root / "val" / "wasp")
    (root / "test" / "bee").rename(root / "test" / "wasp")
    for name, split in (("imagenet", "test"), ("folder", "val"), ("cifar10", "test")):
        with pytest.raises(UserError, match=r"different classes: only in train: bee; only in (val|test): wasp"):
            open_source(name, split=split, image_size=SIZE, root=root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet", "there is no such folder. Set data.root"),
        ("folder", "there is no such folder. Set data.root"),
        ("cifar10", r"does not hold cifar10: .*cifar-10-binary\.tar\.gz\. Add data\.download=true"),
        ("cifar100", r"does not hold cifar100: .*data\.download=true"),
        ("cifar", "data.name=cifar is not known. Did you mean 'cifar10'"),
    ],
)
def test_missing_data_is_named_with_the_remedy(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(name, split="train", image_size=SIZE, root=tmp_path)


def test_a_missing_split_lists_what_is_there(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "val"))
    with pytest.raises(UserError, match=r"test: there is no such folder\. .* has train, val\."):
        open_source("folder", split="test", image_size=SIZE, root=root)
    with pytest.raises(UserError, match=r"split=valid is not known. Did you mean 'val'"):
        open_source("folder", split="valid", image_size=SIZE, root=root)


def test_packs_need_images_of_one_size(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train",), size=(32, 32))
    Image.new("RGB", (31, 32)).save(root / "train" / "bee" / "000.jpg")
    with pytest.raises(UserError, match=r"bee/000\.jpg is 31 x 32 pixels, the first image is 32 x 32"):
        open_source("cifar10", split="train", image_size=SIZE, root=root)


def test_unreadable_images_are_named_while_packing(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train",), size=(32, 32))
    (root / "train" / "bee" / "001.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"bee/001\.jpg: unreadable"):
        open_source("cifar10", split="train", image_size=SIZE, root=root)
    assert not list(root.glob("*pack*"))


def test_records_are_plain_and_fingerprints_tell_splits_apart(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "test"), size=(32, 32))
    sources = [
        open_source(name, split=split, image_size=SIZE, root=root, val_fraction=0.25)
        for name in ("folder", "cifar10", "digits")
        for split in ("train", "val", "test")
    ]
    assert len({source.fingerprint for source in sources}) == 9
    for source in sources:
        facts = source.describe()
        assert facts["samples"] == len(source) == len(source.labels)
        assert facts["fingerprint"] == source.fingerprint
        assert all(isinstance(value, str | int | list) for value in facts.values())
    assert sources[1].describe()["name"] == "folder/val"
