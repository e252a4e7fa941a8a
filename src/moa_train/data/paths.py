"""Image files that a user names for prediction."""

import os
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moa_train.data.file_source import FileSource
from moa_train.data.image import Decoding
from moa_train.data.order import Draw, Indices
from moa_train.data.tree import IMAGE_SUFFIXES, ClassTree, images_below
from moa_train.data.view import View
from moa_train.runtime.errors import UserError

UNREADABLE = -1
"""Index of an image that could not be read, in the batches of a `PathSource`."""


class PathSource(FileSource):
    """Image files without labels. An unreadable file becomes a black image whose index is `UNREADABLE`."""

    def __init__(self, paths: Sequence[str], image_size: tuple[int, int], decoding: Decoding) -> None:
        names = np.array([os.fsencode(path) for path in paths])
        tree = ClassTree(Path(), ["unknown"], names, np.zeros(len(paths), np.int64))
        super().__init__("images", tree, image_size, decoding=decoding)

    def read(self, draw: Draw, seed: int, view: View, substitute: bool) -> tuple[Tensor, Indices, list[str]]:
        """Read the files of a batch. Returns images, indices, and a message for each unreadable file, in order."""
        x_BCHW = torch.zeros(len(draw), 3, *self.image_size, dtype=torch.uint8)
        index, failures = draw.index.copy(), list[str]()
        for place, numbers in enumerate(view.numbers(np.zeros(len(draw), np.uint64))):
            try:
                x_BCHW[place] = self._read(index[place], view, numbers)
            except UserError as error:
                failures.append(str(error).partition(" Repair or remove it")[0])
                index[place] = UNREADABLE
        return x_BCHW, index, failures


def find_images(text: str, lines: Iterable[str] = ()) -> list[str]:
    """Return the paths that ``input`` names: a file, the images in a folder, the matches of a pattern, or ``lines``.

    Args:
        text: path or pattern, or - for ``lines``.
        lines: paths, one per line. Empty lines are skipped.

    Raises:
        UserError: there is no such file or folder, a folder cannot be read, or there are no images.
    """
    if text == "-":
        paths = [path for line in lines if (path := line.rstrip("\r\n"))]
        return _some(paths, "Standard input contains no path. Write one path per line.")
    if Path(text).is_dir():
        try:
            paths = images_below(text)
        except OSError as error:
            raise UserError(f"input={text}: {error.filename} cannot be read: {error.strerror}. Fix that.") from error
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        return _some(paths, f"input={text} contains no image file. Images are recognized by suffix: {suffixes}.")
    if Path(text).exists() or not has_magic(text):
        if not Path(text).exists():
            raise UserError(
                f"input={text} does not exist. Give an image file, a folder, a pattern in quotes ('photos/*.jpg'), or "
                "- to read paths from standard input."
            )
        return [text]
    found = glob(text, recursive=True)  # noqa: PTH207 a Path would require a pattern relative to it
    paths = sorted(path for path in found if not Path(path).is_dir())
    return _some(paths, f"No file matches input={text}.")


def _some(paths: list[str], message: str) -> list[str]:
    if not paths:
        raise UserError(message)
    return paths
