import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.data.image import EncodedImage
from moa_train.data.pack import check_origin, is_packed, pack_paths, read_pack, verify_pack, write_pack
from moa_train.data.tree import scan
from moa_train.data.view import CenterCrop
from moa_train.runtime.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 6), dtype=np.uint8)
LABELS = np.arange(20) % 3
CLASSES = ["a", "b", "c"]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_pack(tmp_path, "train", IMAGES, LABELS, CLASSES, origin="abc")
    return tmp_path


def test_what_was_written_is_read(packed: Path) -> None:
    source = read_pack(packed, "train", "cifar10/train", (8, 6))
    assert isinstance(source.images, np.memmap)
    assert source.labels.tolist() == LABELS.tolist()
    assert source.classes == CLASSES
    order = np.array([7, 7, 0])
    assert np.array_equal(source.gather(order).numpy(), IMAGES[order])
    assert source.name(7) == "cifar10/train/7"
    assert sorted(path.name for path in packed.iterdir()) == ["pack-train.json", "pack-train.npy"]
    verify_pack(packed, "train")


def test_fingerprint_follows_the_pixels(packed: Path, tmp_path: Path) -> None:
    before = read_pack(packed, "train", "x", (8, 6)).fingerprint
    other = IMAGES.copy()
    other[3, 0, 0, 0] ^= 1
    write_pack(tmp_path / "other", "train", other, LABELS, CLASSES)
    assert read_pack(tmp_path / "other", "train", "x", (8, 6)).fingerprint != before


def test_gray_images_get_three_channels(tmp_path: Path) -> None:
    write_pack(tmp_path, "train", IMAGES[:, :1], LABELS, CLASSES)
    images = read_pack(tmp_path, "train", "x", (8, 6)).gather(np.arange(20)).numpy()
    assert images.shape == (20, 3, 8, 6)
    assert (images == IMAGES[:, :1]).all()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_noticed(packed: Path, which: int, part: float) -> None:
    path = pack_paths(packed, "train")[which]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match=rf"{path.name}.*Delete pack-"):
        read_pack(packed, "train", "x", (8, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, but this version reads format 1"),
        ({"labels": [0] * 19}, "19 labels of 3 classes for 20 images"),
        ({"labels": [3] * 20}, "labels"),
        ({"labels": "text"}, "does not describe a pack"),
        ({"files": ["a"]}, "1 file names for 20 images"),
        ({"shape": [20, 3, 6, 8]}, "its description says"),
    ],
)
def test_foreign_descriptions_are_noticed(packed: Path, change: dict[str, object], message: str) -> None:
    path = pack_paths(packed, "train")[1]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_pack(packed, "train", "x", (8, 6))


def test_other_arrays_are_noticed(packed: Path) -> None:
    np.save(pack_paths(packed, "train")[0], IMAGES.astype(np.float32))
    with pytest.raises(UserError, match="holds float32"):
        read_pack(packed, "train", "x", (8, 6))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


def test_pickles_are_never_executed(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(packed)
    path = pack_paths(packed, "train")[0]
    for save in (
        lambda file: pickle.dump(Bomb(), file),
        lambda file: np.save(file, np.array([Bomb()]), allow_pickle=True),
    ):
        with path.open("wb") as file:
            save(file)
        with pytest.raises(UserError, match="cannot be read"):
            read_pack(packed, "train", "x", (8, 6))
    assert not Path("exploded").exists()


def test_one_flipped_bit_is_found_by_verification(packed: Path) -> None:
    path = pack_paths(packed, "train")[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="SHA-256"):
        verify_pack(packed, "train")


def test_a_pack_belongs_to_the_files_it_was_made_of(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "train" / CLASSES[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    tree = scan(tmp_path / "train")
    write_pack(tmp_path, "train", IMAGES, tree.labels, CLASSES, tree.fingerprint, tree.files)
    check_origin(tmp_path, "train", tree)
    assert read_pack(tmp_path, "train", "x", (8, 6)).files.tolist() == tree.files.tolist()  # type: ignore[union-attr]
    (tmp_path / "train" / "a" / "new.png").touch()
    (tmp_path / "train" / "b" / "01.png").unlink()
    with pytest.raises(UserError, match=r"not created from the files .*\(1 added: a/new\.png; 1 removed: b/01\.png\)"):
        check_origin(tmp_path, "train", scan(tmp_path / "train"))


def test_packs_of_older_versions_are_read(packed: Path) -> None:
    path = pack_paths(packed, "train")[1]
    facts = json.loads(path.read_text())
    del facts["files"]
    path.write_text(json.dumps(facts))
    assert read_pack(packed, "train", "x", (8, 6)).files is None


def _write_often(root: Path) -> None:
    for _ in range(20):
        write_pack(root, "train", IMAGES, LABELS, CLASSES)


def test_processes_may_pack_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if is_packed(tmp_path, "train"):  # once it is there, it is whole at any time
            read_pack(tmp_path, "train", "x", (8, 6))
            verify_pack(tmp_path, "train")
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack-train.json", "pack-train.npy"]


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)\. Copy it\."):
        write_pack(tmp_path / "file" / "below", "train", IMAGES, LABELS, CLASSES, remedy="Copy it.")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    import resource
    import signal

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(UserError, match="File too large"):
            write_pack(tmp_path, "train", IMAGES, LABELS, CLASSES)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_not_square_are_seen_as_their_files_are(tmp_path: Path) -> None:
    """A pack keeps the aspect ratio, as the crop of image files does."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 20, 40), dtype=np.uint8)
    write_pack(tmp_path, "train", images, np.array([0, 1]), ["a", "b"])
    for size in ((20, 20), (12, 12), (16, 30)):
        view = CenterCrop(size, 1.0)
        for row, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "x.png")
            expected = view(EncodedImage.of(tmp_path / "x.png"), np.empty(0))
            assert torch.equal(read_pack(tmp_path, "train", "x", size).gather(np.array([row]))[0], expected), size
