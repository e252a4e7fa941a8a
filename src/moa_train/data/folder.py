"""Data sets in class folders: any tree of images, and ImageNet-1K."""

from typing import TYPE_CHECKING

from moa_train.data.dataset import SPLITS, DataSet
from moa_train.runtime.errors import UserError

if TYPE_CHECKING:
    from moa_train.data.source import Source


class ClassFolders(DataSet):
    """Any tree ``root/SPLIT/CLASS/image``, or packs of small images that were made from one."""

    needs_root = True

    def splits(self) -> list[str]:
        """Return the splits that have a folder or a pack; train always belongs to them."""
        from moa_train.data.pack import is_packed

        return ["train", *(s for s in SPLITS[1:] if is_packed(self.root, s) or (self.root / s).is_dir())]

    def read(self, split: str) -> "Source":
        """Open the pack if there is one, otherwise the class folders."""
        from moa_train.data.datasets import scan_split
        from moa_train.data.pack import check_origin, is_packed, read_pack

        if is_packed(self.root, split):
            if (self.root / split).is_dir():
                check_origin(self.root, split, scan_split(self.root, split))
            return read_pack(self.root, split, f"{self.name}/{split}", self.image_size)
        return open_files(self, split, split)


class ImageNet(DataSet):
    """ImageNet-1K: class folders below ``root/train`` and ``root/val``; the latter is the benchmark's test split."""

    num_classes = 1000
    needs_root = True

    def read(self, split: str) -> "Source":
        """Open the class folders."""
        return open_files(self, split, "val" if split == "test" else split)


def open_files(dataset: DataSet, split: str, folder: str) -> "Source":
    """Open the class folders below a folder in the root as a split."""
    from moa_train.data.datasets import scan_split
    from moa_train.data.files import FileSource
    from moa_train.data.image import Decoding
    from moa_train.data.tree import check_split_names

    root = dataset.root
    check_split_names(root)
    if not (root / folder).is_dir():
        found = [other for other in SPLITS if (root / other).is_dir()]
        raise UserError(
            f"{root / folder}: there is no such folder. "
            + (f"{root} has {', '.join(found)}. " if found else "Set data.root to the folder of the data set. ")
            + (f"Did you mean data.root={root.parent}? " if root.name in SPLITS and not found else "")
            + f"Images are expected as {root / folder}/CLASS/NAME.jpg."
        )
    tree, decoding = scan_split(root, folder), Decoding.of(dataset.config)
    return FileSource(f"{dataset.name}/{split}", tree, dataset.image_size, decoding=decoding)
