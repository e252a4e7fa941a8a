"""Held-out parts of a data set: stratified, and the same for every run."""

import numpy as np
from numpy.typing import NDArray

from moa_train.data.counter import permutation
from moa_train.runtime.errors import UserError

SPLIT_SEED = 20210703  # never the run's seed: runs with different seeds must stay comparable

Rows = NDArray[np.int64]


def hold_out(labels: Rows, fraction: float, purpose: int = 0) -> tuple[Rows, Rows]:
    """Divide the samples of each class into a part that stays and a part that is held out.

    Every class with two samples or more keeps one and gives one, whatever the fraction.

    Args:
        labels: int64, N.
        fraction: part held out, above 0 and below 1.
        purpose: divisions for different purposes are independent of each other.

    Returns:
        Indices that stay and indices held out, both ascending.
    """
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction={fraction}: must lie between 0 and 1. Nearest: val_fraction=0.1.")
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held[rows[permutation(len(rows), SPLIT_SEED, purpose, int(label))[:count]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
