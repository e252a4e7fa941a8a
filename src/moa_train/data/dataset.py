"""Data sets by name: the base class, and how one of their splits is opened. Importing this module is cheap."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.plugins import DATASETS, short_name
from moa_train.runtime.errors import UserError, choose
from moa_train.schema import SPLITS, DataConfig, image_shape

if TYPE_CHECKING:
    from moa_train.data.source import Source


class DataSet:
    """A data set: which splits it comes with, and how each is read.

    Derive your own from it and name it by import path, ``data.name=my_package.roses:Roses``. A parameter ``args`` of
    ``__init__``, annotated with a dataclass, receives the settings ``data.args.KEY=VALUE``.

    Attributes:
        mean: channel means of values in 0..1, used for normalization unless ``data.mean`` is given.
        std: channel standard deviations.
        num_classes: number of classes if it is known without opening the data.
        holds_out_by_name: whether ``data.hold_out=name`` applies, if the images have names.
        needs_root: whether ``data.root`` must be given.
        downloads: whether ``data.download=true`` is possible.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of ImageNet, as published with torchvision's models
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_classes: int | None = None
    needs_root = False
    holds_out_by_name = True
    downloads = False

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.name = short_name(config.name)
        self.root = Path(config.root) if config.root is not None else Path("data") / self.name
        self.image_size = image_shape(config.image_size)

    @classmethod
    def check(cls, config: DataConfig) -> None:
        """Check the settings before anything is opened or imported.

        Raises:
            UserError: a setting is missing or does not apply to this data set.
        """
        if cls.needs_root and not config.root:
            raise UserError(
                f"data={config.name} needs data.root=FOLDER, the folder that holds train/ and val/ (or test/)."
            )
        if config.download and not cls.downloads:
            raise UserError(f"data.download=true: {config.name} cannot be downloaded. Set data.root to your copy.")

    def splits(self) -> list[str]:
        """Return the splits that the data set itself comes with, without opening (or downloading) them."""
        return ["train", "test"]

    def read(self, split: str) -> "Source":
        """Open a split, one of those that `splits` returns, and return its images with labels and class names."""
        raise NotImplementedError


def create_dataset(config: DataConfig) -> DataSet:
    """Return the data set that the configuration names."""
    dataset: DataSet = DATASETS.create(config.name, config.args, "data.args", config)
    return dataset


def available_splits(config: DataConfig) -> list[str]:
    """Return the splits that can be opened: the data set's own, and a validation split held out of train."""
    with permitted():
        own = create_dataset(config).splits()
    return [split for split in SPLITS if split in own or (split == "val" and config.val_fraction > 0)]


def open_split(config: DataConfig, split: str) -> "Source":
    """Open one split of a data set.

    ======== ========================================= ======================= ==========================
    name     train                                     val                     test
    ======== ========================================= ======================= ==========================
    digits   four fifths of each class                 held out of train       the other fifth
    cifar*   official training images                  held out of train       official test images
    imagenet root/train                                held out of train       root/val, the benchmark's
    folder   root/train                                root/val, or held out   root/test
    ======== ========================================= ======================= ==========================

    ``data.val_fraction`` of the training images are held out: stratified, and the same for every seed of a run.

    Raises:
        UserError: the data is missing, empty, inconsistent or damaged, or there is no such split.
    """
    with permitted():
        return _limited(_open(create_dataset(config), config, split), config, split)


def _open(dataset: DataSet, config: DataConfig, split: str) -> "Source":
    from moa_train.data.split import hold_out, hold_out_by_name

    if split not in SPLITS:
        raise UserError(choose("split", split, SPLITS))
    own, fraction = dataset.splits(), config.val_fraction
    if fraction and "val" in own:
        raise UserError(
            f"data.val_fraction={fraction}, but {dataset.root} has a validation split of its own. "
            "Set data.val_fraction=0, or rename val/ to test/ if it is meant to be the test split."
        )
    if split == "test" or (split == "val" and "val" in own):
        return dataset.read(split)
    train = dataset.read("train")
    if fraction:
        if config.hold_out == "name" and dataset.holds_out_by_name and train.files is not None:
            kept, held = hold_out_by_name(train.files.tolist(), train.labels, fraction)
        else:
            kept, held = hold_out(train.labels, fraction)
        return train.subset(kept if split == "train" else held, f"{dataset.name}/{split}")
    if split == "val":
        raise UserError(
            f"data={dataset.name} has no validation split. Hold out a part of the training images, for example with "
            "data.val_fraction=0.1."
        )
    return train


def _limited(source: "Source", config: DataConfig, split: str) -> "Source":
    """Return the part of the training split that ``data.limit`` leaves."""
    import numpy as np

    if split == "train" and config.limit and config.limit < len(source):
        # Evenly spaced, because the samples of class folders are sorted by class.
        rows = np.linspace(0, len(source) - 1, config.limit).astype(np.int64)
        return source.subset(rows, f"{short_name(config.name)}/part")
    return source


@contextmanager
def permitted() -> Iterator[None]:
    """Turn an ``OSError`` into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        place = error.filename or "The data set"
        raise UserError(f"{place} cannot be read: {error.strerror}. Fix that, or set data.root.") from error
