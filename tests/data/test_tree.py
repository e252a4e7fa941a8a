from pathlib import Path

import pytest

from moa_train.data.tree import (
    SYSTEM_FOLDERS,
    ClassTree,
    check_plausible,
    check_split_names,
    class_folders,
    compare_classes,
    scan,
)
from moa_train.runtime.errors import UserError


def write(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_classes_and_files_are_sorted_by_name(tmp_path: Path) -> None:
    tree = scan(write(tmp_path, "b/2.png", "b/10.jpg", "a/x.jpeg", "C/z.webp"))
    assert tree.classes == ["C", "a", "b"]
    assert [str(tree.path(row).relative_to(tmp_path)) for row in range(4)] == [
        "C/z.webp",
        "a/x.jpeg",
        "b/10.jpg",
        "b/2.png",
    ]
    assert tree.labels.tolist() == [0, 1, 2, 2]


def test_what_is_no_image_is_left_out_and_counted(tmp_path: Path) -> None:
    tree = scan(
        write(
            tmp_path,
            "a/1.JPG",
            "a/deeper/2.Png",
            "a/deeper/3.jfif",
            *("a/deeper/4.avif", "a/deeper/5.jp2", "a/deeper/6.J2K"),
            "a/.3.jpg",
            "a/notes.txt",
            "a/.cache/4.jpg",
            ".hidden/5.jpg",
            "readme.md",
            "6.jpg",
        )
    )
    assert tree.classes == ["a"]
    assert [tree.path(row).name for row in range(len(tree.files))] == [
        *("1.JPG", "2.Png", "3.jfif", "4.avif", "5.jp2", "6.J2K")
    ]
    assert tree.ignored == 4  # not looked into: hidden folders


def test_names_in_other_alphabets(tmp_path: Path) -> None:
    tree = scan(write(tmp_path, "Äpfel/grün.jpg", "猫/一.png"))
    assert all(tree.path(row).is_file() for row in range(2))


def test_fingerprint_follows_names_and_labels(tmp_path: Path) -> None:
    one = scan(write(tmp_path / "one", "a/1.jpg", "b/2.jpg")).fingerprint
    assert scan(write(tmp_path / "same", "a/1.jpg", "b/2.jpg")).fingerprint == one
    assert scan(write(tmp_path / "moved", "a/1.jpg", "a/2.jpg", "b/3.jpg")).fingerprint != one
    assert scan(write(tmp_path / "renamed", "a/1.jpg", "c/2.jpg")).fingerprint != one


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no such folder"),
        (["x.jpg"], "no class folders"),
        (["a/1.jpg", "b/notes.txt"], "b: no image in this class folder \\(1 other files\\)"),
    ],
)
def test_missing_and_empty_folders_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scan(write(tmp_path / "root", *names))


def names(tree: ClassTree) -> list[str]:
    return [str(tree.path(row).relative_to(tree.root)) for row in range(len(tree.files))]


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "store", "wild/1.jpg", "wild/deeper/2.jpg", "3.jpg")
    root = write(tmp_path / "root", "cat/0.jpg", "dog/0.jpg")
    (root / "cat" / "wild").symlink_to(tmp_path / "store" / "wild")
    (root / "cat" / "3.jpg").symlink_to(tmp_path / "store" / "3.jpg")
    (root / "eel").symlink_to(tmp_path / "store", target_is_directory=True)
    (root / "fox").symlink_to("dog")  # twice is not a loop
    tree = scan(root)
    assert names(tree) == [
        *("cat/0.jpg", "cat/3.jpg", "cat/wild/1.jpg", "cat/wild/deeper/2.jpg"),
        *("dog/0.jpg", "eel/3.jpg", "eel/wild/1.jpg", "eel/wild/deeper/2.jpg", "fox/0.jpg"),
    ]
    assert (tree.ignored, tree.broken) == (0, [])


def test_links_that_lead_nowhere_or_in_a_loop_are_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "data" / "train", "cat/0.jpg", "cat/deeper/1.jpg", "dog/0.jpg")
    loops = {"cat/deeper/up": "..", "cat/self": ".", "dog/train": root, "dog/data": root.parent, "dog/all": "/"}
    nowhere = {"cat/gone": "nowhere", "eel": "/nowhere", "dog/circle": "circle"}
    for name, target in (loops | nowhere).items():
        (root / name).symlink_to(target)
    tree = scan(root)
    assert names(tree) == ["cat/0.jpg", "cat/deeper/1.jpg", "dog/0.jpg"]
    assert sorted(tree.broken) == sorted(str(root / name) for name in loops | nowhere)
    assert tree.ignored == len(tree.broken)


def test_different_classes_are_listed() -> None:
    with pytest.raises(UserError, match=r"a/train and b/val have .* only in train: ant; only in val: cat, dog"):
        compare_classes("a/train", ["ant", "bee"], "b/val", ["bee", "cat", "dog"])
    with pytest.raises(UserError, match="their order differs"):
        compare_classes("a/train", ["ant", "bee"], "b/val", ["bee", "ant"])
    with pytest.raises(UserError, match=r"Unicode form .*'A\\u0308pfel', '\\xc4pfel'"):
        compare_classes("train", ["A\u0308pfel", "bee"], "val", ["bee", "\xc4pfel"])
    compare_classes("a/train", ["ant", "bee"], "b/val", ["ant", "bee"])


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat"], "single class, cat: there is nothing to learn"),
        (["train", "val"], r"holds only the folders train, val, which look like splits, not classes\. Set data\.root="),
        (["train"], "look like splits"),
        (["Validation", "TRAIN"], "look like splits"),
        *((["cat", "dog", name], "this folder is not a class. Delete it") for name in sorted(SYSTEM_FOLDERS)),
        (["cat", "A\u0308pfel", "\xc4pfel"], r"differ only in their Unicode form .*'A\\u0308pfel' and '\\xc4pfel'"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_plausible(write(tmp_path, *(f"{name}/1.jpg" for name in folders)), "train")


def test_classes_may_be_called_like_a_split_among_others(tmp_path: Path) -> None:
    check_plausible(write(tmp_path, "train/1.jpg", "car/1.jpg", "test/1.jpg", ".ipynb_checkpoints/1.jpg"), "train")
    assert class_folders(tmp_path) == ["car", "test", "train"]
    check_plausible(write(tmp_path / "val", "cat/1.jpg"), "val")  # what train has is compared elsewhere


@pytest.mark.parametrize("name", sorted(SYSTEM_FOLDERS))
def test_folders_of_the_system_hold_no_images(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="not part of a data set"):
        scan(write(tmp_path, "cat/1.jpg", f"cat/{name}/1.jpg/thumbnail.jpg", "dog/1.jpg"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("valid", "val"), ("validation", "val"), ("Val", "val"), ("dev", "val"), ("Test", "test"), ("training", "train")],
)
def test_splits_in_another_spelling_are_not_passed_over(tmp_path: Path, name: str, meant: str) -> None:
    write(tmp_path, f"{name}/cat/1.jpg", "notes/x.txt")
    with pytest.raises(UserError, match=rf"{name}: a folder of this name is not read. Rename it to .*{meant}"):
        check_split_names(tmp_path)
    write(tmp_path, f"{meant}/cat/1.jpg")
    check_split_names(tmp_path)


def test_flat_splits_say_what_is_missing(tmp_path: Path) -> None:
    """As the validation images of ImageNet come."""
    with pytest.raises(UserError, match="no class folders, but 2 images"):
        scan(write(tmp_path, "ILSVRC2012_val_1.JPEG", "ILSVRC2012_val_2.JPEG"))
