"""Class folders as users have them: packs and files next to each other, held-out parts, trees that are not meant."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moa_train.assembly.inputs import open_splits
from moa_train.data.array_source import ArraySource
from moa_train.data.dataset import open_split
from moa_train.data.pack import pack_tree, write_pack
from moa_train.data.source import Source, align
from moa_train.data.split import hold_out
from moa_train.data.tree import scan
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig, RunConfig

SIZE = (16, 16)


def configuration(name: str, root: Path | None = None, **settings: Any) -> DataConfig:
    settings |= {"image_size": list(settings.pop("image_size", SIZE))}
    return DataConfig(name=name, root=None if root is None else str(root), **settings)


def open_source(name: str, *, split: str, **settings: Any) -> Source:
    return open_split(configuration(name, **settings), split)


def open_every_split(name: str, root: Path) -> dict[str, Source]:
    config = RunConfig(data=configuration(name, root))
    with Distributed.start("cpu", 60.0) as alone:
        return open_splits(config, alone)[0]


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
    with pytest.raises(UserError, match=r"pack-train\.json was not created from .*1 added: cat/999\.jpg.*pack again"):
        open_source("folder", split="train", image_size=SIZE, root=root)
    new.unlink()
    description = (root / "pack-train.json").read_bytes()
    (root / "pack-train.json").write_bytes(description[:-9])
    with pytest.raises(UserError, match=r"pack-train\.json .*pack again"):
        open_source("folder", split="train", image_size=SIZE, root=root)
    (root / "pack-train.json").write_bytes(description)
    for split in ("train", "val"):
        shutil.copytree(root / split / "cat", root / split / "eel")
        with pytest.raises(UserError, match=r"pack-.*\.json was not created from .*2 added: eel/000\.jpg"):
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
        with pytest.raises(UserError, match=r"train.* and .*(val|test).* have different classes: only in"):
            open_every_split(name, root)


def test_classes_are_compared_before_anything_is_packed(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "val", "test"), size=(32, 32))
    (root / "val" / "bee").rename(root / "val" / "wasp")
    (root / "test" / "bee").rename(root / "test" / "wasp")
    for name in ("imagenet", "folder", "cifar10"):
        with pytest.raises(UserError, match=r"different classes: only in train: bee; only in (val|test): wasp"):
            open_every_split(name, root)
    assert not (root / "pack-test.npy").exists()


def test_the_order_of_classes_is_compared(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    write_pack(tmp_path, "train", images, np.arange(2), ["b", "a"])
    write_pack(tmp_path, "val", images, np.arange(2), ["a", "b"])
    with pytest.raises(UserError, match="their order differs"):
        open_every_split("folder", tmp_path)


def test_trees_that_are_not_likely_to_be_meant_are_refused(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = make_tree(splits=("train/train", "val/train"))
    with pytest.raises(UserError, match=r"train holds only the folders train, .* Set data\.root=.*train"):
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
            with pytest.raises(
                UserError, match=r"the model and .*test.* have different classes: .*only in .*test.*: dog"
            ):
                align(whole, ["ant", "bee", "cat"])
    assert align(whole, ["bee", "dog"]) is whole
    assert align(whole, ["dog", "bee"]).labels.tolist() == [1, 1, 0, 0]
    assert not caplog.text
