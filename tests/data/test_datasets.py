import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from moa_train.assembly.inputs import open_splits
from moa_train.data.arrays import ArraySource
from moa_train.data.dataset import available_splits, open_split
from moa_train.data.datasets import pack_tree
from moa_train.data.pack import write_pack
from moa_train.data.source import Source, align
from moa_train.data.split import hold_out
from moa_train.data.tree import scan
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig, RunConfig

SIZE = (16, 16)
NAMES = ("digits", "cifar10", "cifar100", "imagenet", "folder")


def configuration(name: str, root: Path | None = None, **settings: Any) -> DataConfig:
    settings |= {"image_size": list(settings.pop("image_size", SIZE))}
    return DataConfig(name=name, root=None if root is None else str(root), **settings)


def open_source(name: str, *, split: str, **settings: Any) -> Source:
    return open_split(configuration(name, **settings), split)


def open_every_split(name: str, root: Path) -> dict[str, Source]:
    config = RunConfig(data=configuration(name, root))
    with Distributed.start("cpu") as alone:
        return open_splits(config, alone)[0]


def has_split(name: str, split: str, root: Path, val_fraction: float = 0.0) -> bool:
    return split in available_splits(configuration(name, root, val_fraction=val_fraction))


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
    assert len(parts["test"]) == len(parts["train"]) + len(parts["val"]) == 15
    assert all(set(part.labels.tolist()) == {0, 1, 2} for part in parts.values())
    assert all("/val/" in parts["test"].name(row) for row in range(15))
    held = {parts["val"].name(row) for row in range(len(parts["val"]))}
    kept = {parts["train"].name(row) for row in range(len(parts["train"]))}
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


@pytest.mark.parametrize("name", NAMES)
def test_without_a_validation_split_the_error_says_how_to_get_one(name: str, make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "test"), size=(32, 32))
    assert not has_split(name, "val", root)
    with pytest.raises(UserError, match=r"no validation split\. Hold out a part of .*val_fraction=0\.1"):
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
    for name in ("imagenet", "folder", "cifar10"):
        with pytest.raises(UserError, match=r"different classes: only in train: bee; only in (val|test): wasp"):
            open_every_split(name, root)
    assert not (root / "pack-test.npy").exists()


def pack(root: Path, out: Path, *splits: str) -> None:
    for split in splits:
        pack_tree(scan(root / split), out, split)


def test_a_pack_next_to_other_files_is_refused(make_tree: Callable[..., Path]) -> None:
    """It would be read, and the new class and the new files would not."""
    root = make_tree(splits=("train", "val"), classes=("cat", "dog"), per_class=2)
    pack(root, root, "train", "val")
    for split in ("train", "val"):
        assert isinstance(open_source("folder", split=split, image_size=SIZE, root=root), ArraySource)
    new = root / "train" / "cat" / "999.jpg"
    new.write_bytes((root / "train" / "cat" / "000.jpg").read_bytes())
    with pytest.raises(UserError, match=r"pack-train\.json was not made of .*1 added: cat/999\.jpg.*pack again"):
        open_source("folder", split="train", image_size=SIZE, root=root)
    new.unlink()
    for split in ("train", "val"):
        shutil.copytree(root / split / "cat", root / split / "eel")
        with pytest.raises(UserError, match=r"pack-.*\.json was not made of .*2 added: eel/000\.jpg"):
            open_source("folder", split=split, image_size=SIZE, root=root)


@pytest.mark.parametrize("classes", [("ant", "bee"), ("cat", "dog", "eel"), ("cat", "eel"), ("cat",)])
@pytest.mark.parametrize("packed", [("train",), ("val",), ("train", "val"), ()])
def test_splits_need_the_same_classes_in_any_form(
    make_tree: Callable[..., Path], tmp_path: Path, classes: tuple[str, ...], packed: tuple[str, ...]
) -> None:
    one = make_tree(splits=("train",), classes=("cat", "dog"), per_class=1, name="one", size=(32, 32))
    other = make_tree(splits=("val", "test"), classes=classes, per_class=1, name="other", size=(32, 32))
    root = tmp_path / "root"
    for source, split in ((one, "train"), (other, "val"), (other, "test")):
        if split in packed or (split == "test" and "val" in packed):
            pack(source, root, split)
        else:
            shutil.copytree(source / split, root / split)
    for name in ("folder", "cifar10"):
        with pytest.raises(UserError, match=r"train and .*(val|test) have different classes: only in"):
            open_every_split(name, root)


def test_the_order_of_classes_is_compared(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    write_pack(tmp_path, "train", images, np.arange(2), ["b", "a"])
    write_pack(tmp_path, "val", images, np.arange(2), ["a", "b"])
    with pytest.raises(UserError, match="their order differs"):
        open_every_split("folder", tmp_path)


def test_trees_that_are_not_likely_to_be_meant_are_refused(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = make_tree(splits=("train/train", "val/train"))
    with pytest.raises(UserError, match=r"train has no classes but the folders train, .* Set data\.root=.*train"):
        open_source("folder", split="train", image_size=SIZE, root=root)
    assert len(open_source("folder", split="train", image_size=SIZE, root=root / "train")) == 12
    with pytest.raises(UserError, match=rf"there is no such folder\. Set .* Did you mean data\.root={root / 'val'}\?"):
        open_source("folder", split="train", image_size=SIZE, root=root / "val" / "train")
    single = make_tree(splits=("train", "val"), classes=("cat",), name="single")
    for name in ("folder", "imagenet", "cifar10"):
        with pytest.raises(UserError, match="single class, cat"):
            open_source(name, split="train", image_size=SIZE, root=single)
    other = make_tree(splits=("train", "validation"), name="other")
    for name in ("folder", "imagenet"):
        with pytest.raises(UserError, match=r"validation: a folder of this name is not read\. Rename it to .*val,"):
            open_source(name, split="train", image_size=SIZE, root=other)


HELD_OUT = {"val_fraction": 0.25, "hold_out": "name"}


def split_of(root: Path, **settings: object) -> dict[str, str]:
    """Return the split of each file."""
    found = {}
    for split in ("train", "val"):
        source = open_source("folder", split=split, root=root, **(HELD_OUT | settings))  # type: ignore[arg-type]
        assert source.files is not None
        found |= {name.decode(): split for name in source.files.tolist()}
    return found


def test_adding_and_removing_files_moves_no_other(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train",), per_class=30)
    before = split_of(root)
    assert 10 < sum(split == "val" for split in before.values()) < 35
    for number in range(10):
        shutil.copy(root / "train" / "bee" / "000.jpg", root / "train" / "bee" / f"00{number}x.jpg")
        (root / "train" / "cat" / f"{3 * number:03}.jpg").unlink()
    shutil.copytree(root / "train" / "ant", root / "train" / "aardvark")  # every label changes
    after = split_of(root)
    assert all(after.get(name, split) == split for name, split in before.items())
    pack(root, root, "train")
    assert split_of(root) == after  # packed or not


def test_runs_of_older_versions_keep_their_split(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train",), per_class=10)
    train = open_source("folder", split="train", image_size=SIZE, root=root)
    kept, held = hold_out(train.labels, 0.25)
    for split, rows in (("train", kept), ("val", held)):
        part = open_source("folder", split=split, root=root, val_fraction=0.25)
        assert [part.name(row) for row in range(len(part))] == [train.name(row) for row in rows]
    assert RunConfig().data.hold_out == "position"  # what configurations have that do not name it
    pack(root, root, "train")
    for name in ("cifar10", "cifar100"):  # the rows of published numbers
        part = open_source(name, split="val", root=root, val_fraction=0.25, hold_out="name")
        assert [part.name(row) for row in range(len(part))] == [f"{name}/val/{row}" for row in held]


def test_a_model_is_evaluated_on_the_classes_that_are_there(
    make_tree: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_tree(splits=("test",), classes=("bee", "dog"), per_class=2, size=(32, 32))
    for packed in (False, True):
        if packed:
            pack(root, root, "test")
        for name in ("folder", "cifar10"):
            whole = open_source(name, split="test", root=root)
            source = align(whole, ["ant", "bee", "cat", "dog"])
            assert source.labels.tolist() == [1, 1, 3, 3]
            assert source.classes == ["ant", "bee", "cat", "dog"]
            assert f"{name}/test has no images of 2 of the 4 classes: ant, cat" in caplog.text
            caplog.clear()
            with pytest.raises(UserError, match=r"the model and .*test have different classes: .*only in test: dog"):
                align(whole, ["ant", "bee", "cat"])
    assert align(whole, ["bee", "dog"]) is whole
    assert align(whole, ["dog", "bee"]).labels.tolist() == [1, 1, 0, 0]
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet", "there is no such folder. Set data.root"),
        ("folder", "there is no such folder. Set data.root"),
        ("cifar10", r"does not hold cifar10: .*cifar-10-binary\.tar\.gz\. Add data\.download=true"),
        ("cifar100", r"does not hold cifar100: .*data\.download=true"),
        ("cifar", "data set=cifar is not known. Did you mean 'cifar10'"),
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
