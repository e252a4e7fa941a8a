"""Images for people to look at."""

import torch
from torch import Tensor

from moa_train.data.augment import Normalize


def preview(images: Tensor, normalize: Normalize, columns: int = 8, rows: int = 4) -> Tensor:
    """Arrange the first images of an augmented batch in a grid, with their normalisation undone.

    Args:
        images: float, B C H W, as augmentation and mixing leave them.
        normalize: what normalised them.
        columns: images a row, at most.
        rows: rows, at most.

    Returns:
        uint8, C R(H + 2) - 2 N(W + 2) - 2 on the host, white between the images.
    """
    x_BCHW = normalize.undo(images[: columns * rows].detach()).cpu()
    count, channels, height, width = x_BCHW.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = torch.full((channels, rows * (height + 2) - 2, columns * (width + 2) - 2), 255, dtype=torch.uint8)
    for place, image in enumerate(x_BCHW):
        top, left = place // columns * (height + 2), place % columns * (width + 2)
        grid[:, top : top + height, left : left + width] = image
    return grid
