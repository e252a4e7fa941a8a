"""Data sets in class folders: any tree of images, and ImageNet-1K."""

from pathlib import Path
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
        """Open a pack where there is one, else the class folders."""
        from moa_train.data.pack import is_packed, read_pack

        title = f"{self.name}/{split}"
        if is_packed(self.root, split):
            return read_pack(self.root, split, title, self.image_size)
        return open_files(self.root, split, title, self.image_size)


class ImageNet(DataSet):
    """ImageNet-1K: class folders below ``root/train`` and ``root/val``; the latter is the benchmark's test split."""

    num_classes = 1000
    needs_root = True

    def read(self, split: str) -> "Source":
        """Open the class folders."""
        folder = "val" if split == "test" else split
        return open_files(self.root, folder, f"{self.name}/{split}", self.image_size)


def open_files(root: Path, split: str, title: str, image_size: tuple[int, int]) -> "Source":
    """Open the class folders of root/split."""
    from moa_train.data.files import FileSource
    from moa_train.data.tree import scan_split

    if not (root / split).is_dir():
        found = [other for other in SPLITS if (root / other).is_dir()]
        raise UserError(
            f"{root / split}: there is no such folder. "
            + (f"{root} has {', '.join(found)}. " if found else "Set data.root to the folder of the data set. ")
            + f"Images are expected as {root / split}/CLASS/NAME.jpg."
        )
    return FileSource(title, scan_split(root, split), image_size)
