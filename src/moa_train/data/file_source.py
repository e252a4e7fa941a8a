"""Sources whose images are individual files."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_train.data.counter import Floats, sample_keys
from moa_train.data.fingerprint import fingerprint
from moa_train.data.image import Decoding, EncodedImage, reading
from moa_train.data.order import Draw, Indices
from moa_train.data.tree import ClassTree
from moa_train.data.view import View
from moa_train.runtime.errors import UserError

_MAX_TRIES = 100  # files tried in place of an unreadable one


class FileSource:
    """The images of a class-folder tree.

    Args:
        title: data set and split, as in ``imagenet/train``.
        tree: the files.
        image_size: height and width of loaded images.
        rows: indices of the files that belong to this source (default: all).
        decoding: limits and value range.
    """

    in_memory = False

    def __init__(
        self,
        title: str,
        tree: ClassTree,
        image_size: tuple[int, int],
        rows: Indices | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self.title, self.tree, self.image_size, self.classes = title, tree, image_size, tree.classes
        self.decoding = decoding or Decoding()
        self.rows = np.arange(len(tree.files)) if rows is None else rows
        self.labels = tree.labels[self.rows]
        self.fingerprint = fingerprint(title, self.classes, self.labels, self.rows, tree.fingerprint)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return str(self.tree.path(self.rows[index]))

    @property
    def place(self) -> str:
        """Folder that holds the images."""
        return str(self.tree.root)

    @property
    def files(self) -> NDArray[np.bytes_]:
        """Paths of the files, relative to the folder of the split."""
        return self.tree.files[self.rows]

    def subset(self, rows: Indices, title: str) -> "FileSource":
        """Return a source of these samples."""
        return FileSource(title, self.tree, self.image_size, self.rows[rows], self.decoding)

    def describe(self) -> dict[str, Any]:
        """Return a description for the records of a run, in JSON types."""
        return {
            "name": self.title,
            "samples": len(self),
            "classes": len(self.classes),
            "image_size": list(self.image_size),
            "storage": "files",
            "root": str(self.tree.root),
            "ignored_files": self.tree.ignored,
            "fingerprint": self.fingerprint,
        }

    def read(self, draw: Draw, seed: int, view: View, substitute: bool) -> tuple[Tensor, Indices, list[str]]:
        """Read the files of a batch.

        Args:
            draw: B samples.
            seed: seed of the run.
            view: converts a file to pixels of ``image_size``.
            substitute: read the next readable file in place of an unreadable one.

        Returns:
            Images, uint8 B 3 H W; the indices that were read; a message for each unreadable file.

        Raises:
            UserError: a file is unreadable and ``substitute`` is False, or a hundred files in a row are unreadable.
        """
        x_BCHW = torch.empty(len(draw), 3, *self.image_size, dtype=torch.uint8)
        numbers = view.numbers(sample_keys(seed, draw.epoch, draw.index, draw.repeat))
        index, failures = draw.index.copy(), list[str]()
        for place in range(len(draw)):
            for _ in range(_MAX_TRIES):
                try:
                    x_BCHW[place] = self._read(index[place], view, numbers[place])
                    break
                except UserError as error:
                    if not substitute:
                        raise
                    failures.append(str(error))
                    index[place] = (index[place] + 1) % len(self)
            else:
                raise UserError(f"{_MAX_TRIES} files in a row are unreadable. The last one: {failures[-1]}")
        return x_BCHW, index, failures

    def _read(self, index: int, view: View, numbers: Floats) -> Tensor:
        path = self.tree.path(self.rows[index])
        with reading(path):
            return view(EncodedImage.of(path, self.decoding), numbers)
