"""Published test sets are read in the layout in which they are distributed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa_train.report.shifts import READERS, Model, SkipError, locate, real_labels
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig

WNIDS = [f"n{number:08}" for number in range(10, 130, 10)]  # twelve, so that 10 sorts before 2 as text


@pytest.fixture
def imagenet() -> Model:
    return Model(WNIDS, DataConfig(name="imagenet", image_size=32))


def write(folder: Path, count: int = 1) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(folder / f"{index}.jpg")


def test_folders_of_imagenet_v2_are_in_numerical_order(imagenet, tmp_path):
    root = tmp_path / "imagenetv2-matched-frequency-format-val"
    for k in range(12):
        write(root / str(k), 1 + (k == 10))
    (shift,) = READERS["imagenet-v2"](tmp_path, imagenet)
    assert shift.variant == "matched-frequency"
    labels = {
        Path(bytes(file).decode()).parts[0]: label
        for file, label in zip(shift.source.files, shift.source.labels, strict=True)
    }
    assert labels == {str(k): k for k in range(12)}
    assert len(shift.source) == 13


def test_imagenet_v2_needs_a_folder_for_each_class(imagenet, tmp_path):
    for k in range(11):
        write(tmp_path / "imagenetv2-top-images-format-val" / str(k))
    with pytest.raises(SkipError, match="must hold the folders 0 to 11"):
        list(READERS["imagenet-v2"](tmp_path, imagenet))


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r", "imagenet-sketch"])
def test_subsets_keep_the_labels_of_the_model(imagenet, tmp_path, name):
    folder = tmp_path / {"imagenet-sketch": "sketch"}.get(name, name)
    write(folder / WNIDS[7], 2)
    write(folder / WNIDS[2])
    write(folder / "n99999999")  # the model does not know this class
    (folder / "README.txt").write_text("as distributed")
    (shift,) = READERS[name](tmp_path, imagenet)
    assert shift.source.labels.tolist() == [2, 7, 7]
    assert {Path(shift.source.name(row)).parent.name for row in range(3)} == {WNIDS[2], WNIDS[7]}


def test_imagenet_c_is_found_with_and_without_its_groups(imagenet, tmp_path):
    for severity in (1, 3):
        write(tmp_path / "imagenet-c" / "noise" / "gaussian_noise" / str(severity) / WNIDS[0])
    write(tmp_path / "imagenet-c" / "frost" / "5" / WNIDS[4])
    found = {(shift.variant, shift.severity): shift for shift in READERS["imagenet-c"](tmp_path, imagenet)}
    assert set(found) == {("gaussian_noise", 1), ("gaussian_noise", 3), ("frost", 5)}
    assert found["frost", 5].source.labels.tolist() == [4]
    assert found["frost", 5].cropped


def test_severities_of_cifar_c_are_stacked(tmp_path):
    names = ["airplane", *"bcdefghi", "truck"]
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = np.arange(50, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 32, 32, 3), np.uint8)
    images[:, 5, 6, 2] = 200  # row, column, channel
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", np.tile(np.arange(10), 5).astype(np.uint8))
    model = Model(names, DataConfig(name="cifar10", image_size=32))
    shifts = list(READERS["cifar-10-c"](tmp_path, model))
    assert [(shift.variant, shift.severity) for shift in shifts] == [("fog", severity) for severity in range(1, 6)]
    pixels = shifts[3].source.gather(np.array([2]))[0]
    assert pixels[0, 0, 0] == 32
    assert pixels[2, 5, 6] == 200
    assert shifts[3].source.labels.tolist() == list(range(10))
    np.save(folder / "labels.npy", np.zeros(49, np.uint8))
    with pytest.raises(UserError, match=r"fog\.npy holds 50 images, but labels\.npy has 49"):
        list(READERS["cifar-10-c"](tmp_path, model))
    with pytest.raises(SkipError, match="not those of CIFAR-10"):
        list(READERS["cifar-10-c"](tmp_path, Model(WNIDS, model.data)))


def test_versions_of_cifar_10_1(tmp_path):
    folder = tmp_path / "CIFAR-10.1" / "datasets"
    folder.mkdir(parents=True)
    np.save(folder / "cifar10.1_v4_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
    np.save(folder / "cifar10.1_v4_labels.npy", np.array([3, 1, 9], np.int32))
    model = Model(["airplane", *"bcdefghi", "truck"], DataConfig(name="cifar10", image_size=32))
    (shift,) = READERS["cifar-10.1"](tmp_path, model)
    assert (shift.variant, shift.source.labels.tolist()) == ("v4", [3, 1, 9])
    (folder / "cifar10.1_v4_data.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"cifar10\.1_v4_data\.npy cannot be read"):
        list(READERS["cifar-10.1"](tmp_path, model))


@pytest.mark.parametrize("name", READERS)
def test_what_is_not_there_is_skipped(tmp_path, imagenet, name):
    cifar = {"cifar-100-c": ["apple", *(f"b{k:02}" for k in range(98)), "worm"]}.get(
        name, ["airplane", *"bcdefghi", "truck"]
    )
    model = Model(cifar, DataConfig()) if name.startswith("cifar") else imagenet
    with pytest.raises(SkipError, match="there is no"):
        list(READERS[name](tmp_path, model))


def test_real_labels_belong_to_numbers_in_the_file_names(tmp_path):
    wnids = [f"n{number:08}" for number in range(1000)]
    (tmp_path / "real.json").write_text(json.dumps([[1], [], [2, 999]]))
    files = np.array([b"n1/ILSVRC2012_val_00000003.JPEG", b"n1/ILSVRC2012_val_00000001.JPEG"])
    data = DataConfig(name="imagenet", image_size=32)
    assert real_labels(tmp_path, files, Model(wnids, data)) == [[2, 999], [1]]
    assert real_labels(tmp_path, files, Model(wnids[::-1], data)) == [[997, 0], [998]]
    with pytest.raises(SkipError, match="not named ILSVRC2012_val"):
        real_labels(tmp_path, np.array([b"n1/cat.jpg"]), Model(wnids, data))
    with pytest.raises(SkipError, match="all 1,000 classes"):
        real_labels(tmp_path, files, Model(WNIDS, data))
    with pytest.raises(UserError, match="list of labels"):
        real_labels(tmp_path, np.array([b"n1/ILSVRC2012_val_00000009.JPEG"]), Model(wnids, data))


def test_names_are_found_in_any_case_below_the_folder(tmp_path):
    (tmp_path / "shifted" / "ImageNet-A").mkdir(parents=True)
    assert locate(tmp_path, "imagenet-a") == tmp_path / "shifted" / "ImageNet-A"
    assert locate(tmp_path / "shifted" / "ImageNet-A", "imagenet-a") is not None
    assert locate(tmp_path, "imagenet-r") is None
