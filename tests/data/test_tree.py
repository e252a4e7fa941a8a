from collections.abc import Callable
from pathlib import Path

import pytest

from moa_train.data.tree import same_classes, scan
from moa_train.runtime.errors import UserError


def write(root: Path, *names: str) -> Path:
    for name in names:
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
            "a/.3.jpg",
            "a/notes.txt",
            "a/.cache/4.jpg",
            ".hidden/5.jpg",
            "readme.md",
            "6.jpg",
        )
    )
    assert tree.classes == ["a"]
    assert [tree.path(row).name for row in range(len(tree.files))] == ["1.JPG", "2.Png"]
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


def test_different_classes_are_listed(make_tree: Callable[..., Path]) -> None:
    one = make_tree(splits=("train",), classes=("ant", "bee"), per_class=1, name="one") / "train"
    other = make_tree(splits=("val",), classes=("bee", "cat", "dog"), per_class=1, name="other") / "val"
    with pytest.raises(UserError, match="only in train: ant; only in val: cat, dog"):
        same_classes(one, other)
