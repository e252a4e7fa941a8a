import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from moa_train.data.augment import Normalize
from moa_train.data.dataset import DataSet, available_splits, open_split
from moa_train.data.pack import write_pack
from moa_train.data.source import Source
from moa_train.plugins import DATASETS
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig

SIZE = 16


def opened(name: str, split: str, root: Path | None = None, size: int = SIZE, val_fraction: float = 0.0) -> Source:
    root_text = str(root) if root else None
    return open_split(DataConfig(name=name, root=root_text, image_size=size, val_fraction=val_fraction), split)


def test_digits_are_scikit_learns_kept_apart() -> None:
    parts = {split: opened("digits", split, size=8, val_fraction=0.1) for split in ("train", "val", "test")}
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
    source = opened("digits", "test", size=32)
    images = source.gather(np.arange(20))  # type: ignore[union-attr]
    assert images.shape == (20, 3, 32, 32)
    assert (images[:, :1] == images).all()
    native = opened("digits", "test", size=8).gather(np.arange(20))  # type: ignore[union-attr]
    expected = Image.fromarray(native[3, 0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(images[3, 0].numpy().astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_a_folder_tree_is_packed_once(make_tree: Callable[..., Path], name: str) -> None:
    root = make_tree(size=(32, 32), suffix=".png")
    source = opened(name, "train", size=32, root=root)
    assert source.in_memory
    first = root / "train" / "ant" / "000.png"
    assert np.array_equal(source.gather(np.array([0]))[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(first)))
    written = (root / "pack-train.npy").stat()
    again = opened(name, "train", size=32, root=root)
    assert again.fingerprint == source.fingerprint
    assert (root / "pack-train.npy").stat() == written
    assert not (root / "pack-test.npy").exists()
    (root / "train" / "ant" / "999.png").write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"was not created from the files now in"):
        opened(name, "train", size=32, root=root)


def test_a_pack_alone_is_enough(tmp_path: Path) -> None:
    images = np.zeros((10, 3, 32, 32), np.uint8)
    for split in ("train", "test"):
        write_pack(tmp_path, split, images, np.arange(10) % 2, ["a", "b"])
    for name in ("cifar10", "folder"):
        assert len(opened(name, "test", root=tmp_path)) == 10


def test_imagenets_val_folder_is_the_test_split(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "val"), per_class=5)
    parts = {split: opened("imagenet", split, root=root, val_fraction=0.2) for split in ("train", "val", "test")}
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
def test_the_splits_of_a_folder_are_those_on_disk(
    make_tree: Callable[..., Path], splits: tuple[str, ...], fraction: float, available: set[str]
) -> None:
    root = make_tree(splits=splits)
    for split in ("train", "val", "test"):
        config = DataConfig(name="folder", root=str(root), val_fraction=fraction)
        assert (split in available_splits(config)) == (split in available)
        if split in available:
            assert len(opened("folder", split, root=root, val_fraction=fraction)) > 0
        else:
            with pytest.raises(UserError, match=r"val_fraction|no such folder"):
                opened("folder", split, root=root, val_fraction=fraction)


@pytest.mark.parametrize("name", DATASETS.table)
def test_without_a_validation_split_the_error_says_how_to_get_one(name: str, make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "test"), size=(32, 32))
    assert "val" not in available_splits(DataConfig(name=name, root=str(root)))
    with pytest.raises(UserError, match=r"no validation split\. Hold out a part of the training .*val_fraction=0\.1"):
        opened(name, "val", root=root)


def test_val_fraction_with_a_val_folder_is_an_error(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "val"))
    with pytest.raises(UserError, match=r"val_fraction=0\.1, but .* has a validation split of its own"):
        opened("folder", "val", root=root, val_fraction=0.1)
    with pytest.raises(UserError, match=r"val_fraction=0\.1, but"):
        opened("folder", "train", root=root, val_fraction=0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet", "there is no such folder. Set data.root"),
        ("folder", "there is no such folder. Set data.root"),
        ("cifar10", r"does not hold cifar10: .*cifar-10-binary\.tar\.gz\. .* add data\.download=true"),
        ("cifar100", r"does not hold cifar100: .*data\.download=true"),
        ("cifar", "data set=cifar is not known. Did you mean 'cifar10'"),
    ],
)
def test_missing_data_is_named_with_the_fix(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(name, "train", root=tmp_path)


def test_a_missing_split_lists_what_is_there(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "val"))
    with pytest.raises(UserError, match=r"test: there is no such folder\. .* has train, val\."):
        opened("folder", "test", root=root)
    with pytest.raises(UserError, match=r"split=valid is not known. Did you mean 'val'"):
        opened("folder", "valid", root=root)


def test_packs_need_images_of_one_size(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train",), size=(32, 32))
    Image.new("RGB", (31, 32)).save(root / "train" / "bee" / "000.jpg")
    with pytest.raises(UserError, match=r"bee/000\.jpg is 31 x 32 pixels, the first image is 32 x 32"):
        opened("cifar10", "train", root=root)


def test_unreadable_images_are_named_while_packing(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train",), size=(32, 32))
    (root / "train" / "bee" / "001.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"bee/001\.jpg: unreadable"):
        opened("cifar10", "train", root=root)
    assert not list(root.glob("*pack*"))


def test_records_are_plain_and_fingerprints_differ_between_splits(make_tree: Callable[..., Path]) -> None:
    root = make_tree(splits=("train", "test"), size=(32, 32))
    sources = [
        opened(name, split, root=root, val_fraction=0.25)
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


def test_the_example_of_an_own_data_set_runs(
    tmp_path: Path,
    write_module: Callable[[str, str], None],
    example_of: Callable[[object], str],
) -> None:
    write_module("own_roses", example_of(DataSet))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 3, 8, 8), np.uint8), np.arange(20) % 2
    for split, count in (("train", 20), ("test", 5)):
        np.savez(tmp_path / f"{split}.npz", images=images[:count], labels=labels[:count])
    config = DataConfig(name="own_roses:Roses", root=str(tmp_path), image_size=8, val_fraction=0.1)
    DATASETS.load(config.name).check(config)
    assert available_splits(config) == ["train", "val", "test"]
    sources = {split: open_split(config, split) for split in available_splits(config)}
    assert {split: len(source) for split, source in sources.items()} == {"train": 18, "val": 2, "test": 5}
    test = sources["test"]
    assert np.array_equal(test.gather(np.arange(5)).numpy(), images[:5])  # type: ignore[union-attr]
    assert test.labels.tolist() == labels[:5].tolist()
    assert test.name(3) == "Roses/test/3"
    assert test.classes == ["gallica", "rugosa"]
    assert Normalize.of(config).fill.tolist() == [128, 102, 102]


LISTED = """
import csv
from dataclasses import dataclass
from moa_train.data.dataset import DataSet
from moa_train.knobs import knob

@dataclass
class ListedConfig:
    table: str = knob("table.csv", "file with a path, a class and a split in each row")

class Listed(DataSet):
    needs_root = True

    def __init__(self, config, args: ListedConfig):
        super().__init__(config)
        with (self.root / args.table).open() as file:
            self.rows = list(csv.reader(file))

    def splits(self):
        return sorted({split for _, _, split in self.rows})

    def read(self, split):
        rows = [row for row in self.rows if row[2] == split]
        classes = sorted({label for _, label, _ in self.rows})
        return self.from_files(split, [path for path, _, _ in rows], [classes.index(row[1]) for row in rows], classes)
"""


def test_an_own_data_set_of_listed_files(
    make_tree: Callable[..., Path], write_module: Callable[[str, str], None]
) -> None:
    write_module("own_listed", LISTED)
    root = make_tree(splits=("all",), classes=("ant", "bee"), per_class=6)
    rows = [(f"all/{name}/{number:03}.jpg", name) for name in ("ant", "bee") for number in range(6)]
    lines = [f"{path},{name},{('train', 'train', 'val')[row % 3]}" for row, (path, name) in enumerate(rows)]
    (root / "list.csv").write_text("\n".join(lines))
    config = DataConfig(name="own_listed:Listed", root=str(root), args={"table": "list.csv"})
    assert available_splits(config) == ["train", "val"]
    train, val = open_split(config, "train"), open_split(config, "val")
    assert [train.name(row) for row in range(len(train))] == [
        str(root / rows[row][0]) for row in range(12) if row % 3 < 2
    ]
    assert val.labels.tolist() == [0, 0, 1, 1]
    assert train.fingerprint != val.fingerprint
    assert not train.in_memory
    with pytest.raises(UserError, match=r"data\.args\.tabel"):
        open_split(DataConfig(name="own_listed:Listed", root=str(root), args={"tabel": "list.csv"}), "train")
    with pytest.raises(UserError, match=r"table\.csv cannot be read: No such file"):
        open_split(DataConfig(name="own_listed:Listed", root=str(root)), "train")
    with pytest.raises(UserError, match=r"needs data\.root=FOLDER"):
        DATASETS.load(config.name).check(DataConfig(name=config.name))


BROKEN = """
import numpy as np
from moa_train.data.dataset import DataSet

class Broken(DataSet):
    images, labels = np.zeros((4, 3, 8, 8), np.uint8), [0, 1, 0, 1]

    def read(self, split):
        return self.from_arrays(split, self.images, self.labels, ["a", "b"])

class Floats(Broken):
    images = np.zeros((4, 3, 8, 8))

class ChannelsLast(Broken):
    images = np.zeros((4, 8, 8, 3), np.uint8)

class Labels(Broken):
    labels = [0, 1, 2, 1]

class Short(Broken):
    labels = [0, 1]

class Splits(Broken):
    def splits(self):
        return ["train", "validation"]

def function(config):
    return Broken(config)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Floats", r"Floats/train: the images are float64 of shape \(4, 3, 8, 8\); they must be uint8"),
        ("ChannelsLast", r"uint8 of shape \(4, 8, 8, 3\); they must be uint8 of shape \(N, 3, H, W\)"),
        ("Labels", r"from 0 to 2; 4 images of 2 classes need 4 labels from 0 to 1"),
        ("Short", r"the labels have the shape \(2,\)"),
        ("Splits", r"its splits are train, validation\. The only allowed names are train, val, test\."),
        ("function", r"must name a subclass of moa_train\.data\.dataset\.DataSet"),
    ],
)
def test_mistakes_in_an_own_data_set_are_named(
    name: str, message: str, write_module: Callable[[str, str], None]
) -> None:
    write_module("own_broken", BROKEN)
    assert len(open_split(DataConfig(name="own_broken:Broken"), "test")) == 4
    with pytest.raises(UserError, match=message):
        open_split(DataConfig(name=f"own_broken:{name}"), "train")


def test_settings_are_checked_without_importing_numpy_or_torch() -> None:
    """The commands check them first, so that mistakes are reported at once."""
    code = """
import sys
from moa_train.plugins import DATASETS
from moa_train.schema import DataConfig
for name in DATASETS.table:
    DATASETS.load(name).check(DataConfig(name=name, root="somewhere"))
print([module for module in ("numpy", "torch", "PIL") if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
