"""Data sets by name: the base class, and how one of their splits is opened. Importing this module is cheap."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.plugins import DATASETS, short_name
from moa_train.runtime.errors import UserError, choose
from moa_train.schema import SPLITS, DataConfig, image_shape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moa_train.data.source import Source


class DataSet(ABC):
    """A data set: which splits it has, and how each of them is read.

    Derive your own class from it, and name the class by import path, ``data.name=my_package.roses:Roses``::

        import numpy as np
        from moa_train.data.dataset import DataSet

        class Roses(DataSet):
            mean, std = (0.5, 0.4, 0.4), (0.2, 0.2, 0.2)

            def read(self, split):
                arrays = np.load(self.root / f"{split}.npz")
                return self.from_arrays(split, arrays["images"], arrays["labels"], ["gallica", "rugosa"])

    `read` is the only method that a class must have. It returns the result of `from_arrays`, `from_files` or
    `from_folders`. Override `splits` if the data set has other splits than train and test, and the attributes below
    where their defaults do not fit. `check` is called before torch is imported: for a fast start, import expensive
    packages in `read`.

    A class that has settings of its own declares them as a dataclass of `knob` fields, and receives them in a parameter
    of that type: ``def __init__(self, config: DataConfig, args: RosesConfig)``, which starts with
    ``super().__init__(config)``. They are set by ``data.args.KEY=VALUE``.

    Attributes:
        mean: channel means of values in 0..1, used for normalization unless ``data.mean`` is given.
        std: channel standard deviations, likewise.
        num_classes: number of classes if it is known without opening the data.
        holds_out_by_name: whether ``data.hold_out=name`` applies, if the images have names.
        needs_root: whether ``data.root`` must be given.
        downloads: whether `read` can download the data set; `may_download` returns whether it should. Rank 0 then
            reads train before the other ranks start to read.
        config: the section ``data`` of the configuration.
        name: name of the data set, or of your class without its import path.
        root: folder of the data set, ``data.root`` or by default data/NAME.
        image_size: (height, width) of the images that a model receives. Loaders resize images to it.
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
            raise UserError(f"data={config.name} needs data.root=FOLDER, the folder of the data set.")
        if config.download and not cls.downloads:
            raise UserError(
                f"data.download=true: {config.name} cannot be downloaded. "
                + ("Set data.root to your copy." if cls.needs_root else "Remove data.download.")
            )
        if config.url and not cls.downloads:
            raise UserError(f"data.url={config.url}: {config.name} cannot be downloaded. Remove data.url.")

    @classmethod
    def may_download(cls, config: DataConfig) -> bool:
        """Return whether missing data is to be downloaded: if requested, or by default to the default folder."""
        wanted = config.root is None if config.download is None else config.download
        return cls.downloads and wanted

    def splits(self) -> list[str]:
        """Return the splits that the data set itself has, some of train, val and test, without opening them."""
        return ["train", "test"]

    @abstractmethod
    def read(self, split: str) -> "Source":
        """Open a split, one of those that `splits` returns.

        Raises:
            UserError: the data is missing, inconsistent or damaged.
        """

    def from_arrays(
        self,
        split: str,
        images: "NDArray[np.uint8]",
        labels: "Sequence[int] | NDArray[np.integer[Any]]",
        classes: Sequence[str],
        rows: "NDArray[np.int64] | None" = None,
    ) -> "Source":
        """Return a split whose images are in memory or memory-mapped.

        Args:
            split: name of the split.
            images: uint8, (N, C, H, W), where C is 3, or 1 for gray images.
            labels: N positions in ``classes``.
            classes: names of the classes, the same for every split.
            rows: indices of the images that belong to the split (default: all).
        """
        import numpy as np

        from moa_train.data.array_source import ArraySource

        images = np.asanyarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"{self.name}/{split}: the images are {images.dtype} of shape {images.shape}; they must be uint8 "
                "of shape (N, 3, H, W), or (N, 1, H, W) for gray images."
            )
        labels = self._checked(split, labels, len(images), classes)
        return ArraySource(f"{self.name}/{split}", images, labels, classes, self.image_size, rows)

    def from_files(
        self,
        split: str,
        files: Sequence[str | Path],
        labels: "Sequence[int] | NDArray[np.integer[Any]]",
        classes: Sequence[str],
    ) -> "Source":
        """Return a split whose images are the given files, in one of the ``FORMATS`` of moa_train.data.image.

        Args:
            split: name of the split.
            files: N paths, relative to ``self.root`` or absolute.
            labels: N positions in ``classes``.
            classes: names of the classes, the same for every split.
        """
        import numpy as np

        from moa_train.data.file_source import FileSource
        from moa_train.data.image import Decoding
        from moa_train.data.tree import ClassTree

        labels = self._checked(split, labels, len(files), classes)
        names = np.array([os.fsencode(file) for file in files])
        tree = ClassTree(self.root, list(classes), names, labels)
        return FileSource(f"{self.name}/{split}", tree, self.image_size, decoding=Decoding.of(self.config))

    def from_folders(self, split: str, folder: str | None = None) -> "Source":
        """Return a split whose images are in class folders, ``self.root/SPLIT/CLASS/NAME.jpg``.

        Args:
            split: name of the split.
            folder: name of its folder below ``self.root`` (default: the same).
        """
        from moa_train.data.file_source import FileSource
        from moa_train.data.image import Decoding
        from moa_train.data.tree import check_split_names, scan_split

        root, folder = self.root, folder or split
        check_split_names(root)
        if not (root / folder).is_dir():
            found = [other for other in SPLITS if (root / other).is_dir()]
            raise UserError(
                f"{root / folder}: there is no such folder. "
                + (f"{root} has {', '.join(found)}. " if found else "Set data.root to the folder of the data set. ")
                + (f"Did you mean data.root={root.parent}? " if root.name in SPLITS and not found else "")
                + f"Images are expected as {root / folder}/CLASS/NAME.jpg."
            )
        tree, decoding = scan_split(root, folder), Decoding.of(self.config)
        return FileSource(f"{self.name}/{split}", tree, self.image_size, decoding=decoding)

    def _checked(self, split: str, labels: Any, count: int, classes: Sequence[str]) -> "NDArray[np.int64]":
        import numpy as np

        array: NDArray[np.int64] = np.asarray(labels, np.int64)
        if array.shape != (count,) or (count and not 0 <= array.min() <= array.max() < len(classes)):
            found = f", from {array.min()} to {array.max()}" if array.size else ""
            raise UserError(
                f"{self.name}/{split}: the labels have the shape {array.shape}{found}; {count} images of "
                f"{len(classes)} classes need {count} labels from 0 to {len(classes) - 1}."
            )
        return array


def create_dataset(config: DataConfig) -> DataSet:
    """Return the data set that the configuration names.

    Raises:
        UserError: the name is not known or is not the import path of a `DataSet`, or the data set is inconsistent.
    """
    found = DATASETS.load(config.name)
    if not (isinstance(found, type) and issubclass(found, DataSet)):
        raise UserError(f"data.name={config.name} must name a subclass of moa_train.data.dataset.DataSet.")
    dataset: DataSet = DATASETS.create(config.name, config.args, "data.args", config)
    if not set(dataset.splits()) <= set(SPLITS):
        found, allowed = ", ".join(dataset.splits()), ", ".join(SPLITS)
        raise UserError(f"data.name={config.name}: its splits are {found}. The only allowed names are {allowed}.")
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
        dataset = create_dataset(config)
        return _limited(_open(dataset, config, split), dataset, split)


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


def _limited(source: "Source", dataset: DataSet, split: str) -> "Source":
    """Return the part of the training split that ``data.limit`` leaves."""
    import numpy as np

    limit = dataset.config.limit
    if split == "train" and limit and limit < len(source):
        # Evenly spaced, because the samples of class folders are sorted by class.
        rows = np.linspace(0, len(source) - 1, limit).astype(np.int64)
        return source.subset(rows, f"{dataset.name}/part")
    return source


@contextmanager
def permitted() -> Iterator[None]:
    """Turn an ``OSError`` into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        place = error.filename or "The data set"
        raise UserError(f"{place} cannot be read: {error.strerror or error}. Fix that, or set data.root.") from error
