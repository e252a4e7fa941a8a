"""The data sets by name."""

from pathlib import Path

from moa_train.data.digits import open_digits
from moa_train.data.pack import is_packed, read_pack
from moa_train.data.source import Source
from moa_train.data.split import hold_out
from moa_train.runtime.errors import UserError, choose

DATASETS = ("digits", "cifar10", "cifar100", "imagenet", "folder")
SPLITS = ("train", "val", "test")


def open_source(
    name: str,
    *,
    split: str,
    image_size: tuple[int, int],
    root: str | Path | None = None,
    val_fraction: float = 0.0,
    download: bool = False,
) -> Source:
    """Open one split of a data set."""
    if name not in DATASETS:
        raise UserError(choose("data.name", name, DATASETS))
    if split not in SPLITS:
        raise UserError(choose("split", split, SPLITS))
    if split == "test":
        return _open(name, split, image_size, root, download)
    train = _open(name, "train", image_size, root, download)
    if split == "val" and not val_fraction:
        raise UserError(
            f"data={name} has no validation split of its own. Hold out a part of train with data.val_fraction=0.1."
        )
    if not val_fraction:
        return train
    kept, held = hold_out(train.labels, val_fraction)
    return train.subset(kept if split == "train" else held, f"{name}/{split}")


def _open(name: str, split: str, image_size: tuple[int, int], root: str | Path | None, download: bool) -> Source:
    if name == "digits":
        return open_digits(split, image_size)
    folder = Path(root or Path("data") / name)
    if is_packed(folder, split):
        return read_pack(folder, split, f"{name}/{split}", image_size)
    raise UserError(f"{folder}: no pack.")
