"""Data sets in class folders: any tree of images, and ImageNet-1K."""

from typing import TYPE_CHECKING

from moa_train.data.dataset import DataSet
from moa_train.schema import SPLITS

if TYPE_CHECKING:
    from moa_train.data.source import Source


class ClassFolders(DataSet):
    """Any tree ``root/SPLIT/CLASS/image``, or packs of small images that were made from one."""

    needs_root = True

    def splits(self) -> list[str]:
        """Return the splits that have a folder or a pack; train is always one of them."""
        from moa_train.data.pack import is_packed

        return ["train", *(s for s in SPLITS[1:] if is_packed(self.root, s) or (self.root / s).is_dir())]

    def read(self, split: str) -> "Source":
        """Open the pack of a split if there is one, else its class folders."""
        from moa_train.data.pack import check_origin, is_packed, read_pack
        from moa_train.data.tree import scan_split

        if is_packed(self.root, split):
            source = read_pack(self.root, split, f"{self.name}/{split}", self.image_size)
            if (self.root / split).is_dir():
                check_origin(self.root, split, scan_split(self.root, split))
            return source
        return self.from_folders(split)


class ImageNet(DataSet):
    """ImageNet-1K: class folders below ``root/train`` and ``root/val``; the latter is the benchmark's test split."""

    num_classes = 1000
    needs_root = True

    def read(self, split: str) -> "Source":
        """Open the class folders of a split."""
        return self.from_folders(split, "val" if split == "test" else split)
