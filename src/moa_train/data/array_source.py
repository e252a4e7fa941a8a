"""Sources whose images are small and stored in one array, from which each batch is gathered at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_train.data.fingerprint import Labels, fingerprint
from moa_train.data.resample import resample
from moa_train.data.view import just_covering


class ArraySource:
    """Images of one native size in an array that is usually memory-mapped.

    Args:
        title: data set and split, as in ``cifar100/train``.
        images: uint8, N C H W with C = 1 (repeated to 3) or C = 3.
        labels: N class indices.
        classes: names of the classes.
        image_size: size of the batches; other native sizes are resampled (bicubic, antialiased).
        rows: indices of the elements of ``images`` and ``labels`` that belong to this source (default: all).
        content: hash of the pixels, if known.
        files: paths of the files that the elements of ``images`` were created from, as in ``ClassTree``, if known.
    """

    in_memory = True

    def __init__(
        self,
        title: str,
        images: NDArray[np.uint8],
        labels: Labels,
        classes: Sequence[str],
        image_size: tuple[int, int],
        rows: NDArray[np.int64] | None = None,
        content: str = "",
        files: NDArray[np.bytes_] | None = None,
    ) -> None:
        self.title, self.images, self.classes, self.image_size = title, images, list(classes), image_size
        self.content, self._all_files, self._all_labels = content, files, np.asarray(labels, np.int64)
        self.rows = np.arange(len(images)) if rows is None else rows
        self.labels = self._all_labels[self.rows]
        self.fingerprint = fingerprint(title, self.classes, self.labels, self.rows, images.shape[1:], content)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return title and row, as in ``cifar100/train/17``."""
        return f"{self.title}/{self.rows[index]}"

    def subset(self, rows: NDArray[np.int64], title: str) -> "ArraySource":
        """Return a source of these samples that shares the memory."""
        return ArraySource(
            title,
            self.images,
            self._all_labels,
            self.classes,
            self.image_size,
            self.rows[rows],
            self.content,
            self._all_files,
        )

    def relabeled(self, table: NDArray[np.int64], classes: Sequence[str]) -> "ArraySource":
        """Return the source with label k replaced by ``table[k]``, the position of its class in ``classes``."""
        labels = table[self._all_labels]
        return ArraySource(
            self.title, self.images, labels, classes, self.image_size, self.rows, self.content, self._all_files
        )

    @property
    def place(self) -> str:
        """File that holds the images, or the title if they are only in memory."""
        return str(self.images.filename) if isinstance(self.images, np.memmap) else self.title

    @property
    def files(self) -> NDArray[np.bytes_] | None:
        """Paths of the files that the samples were created from, if known."""
        return None if self._all_files is None else self._all_files[self.rows]

    def gather(self, index: NDArray[np.int64]) -> Tensor:
        """Return the images at these indices: uint8, B 3 H W. As files, they keep their aspect ratio."""
        x_BCHW = torch.from_numpy(np.ascontiguousarray(self.images[self.rows[index]]))
        if x_BCHW.shape[-2:] != self.image_size:
            resized = just_covering(self.image_size, *x_BCHW.shape[-2:])
            top, left = (round((whole - side) / 2) for whole, side in zip(resized, self.image_size, strict=True))
            x_BCHW = resample(x_BCHW, resized)[..., top : top + self.image_size[0], left : left + self.image_size[1]]
        return x_BCHW.repeat(1, 3, 1, 1) if x_BCHW.shape[1] == 1 else x_BCHW

    def describe(self) -> dict[str, Any]:
        """Return a description for the records of a run, in JSON types."""
        return {
            "name": self.title,
            "samples": len(self),
            "classes": len(self.classes),
            "native_size": list(self.images.shape[-2:]),
            "image_size": list(self.image_size),
            "storage": "memory-mapped" if isinstance(self.images, np.memmap) else "memory",
            "fingerprint": self.fingerprint,
        }
