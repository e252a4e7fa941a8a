"""Hold out part of a data set, stratified by class and identical in every run."""

import os
from collections.abc import Iterable
from hashlib import blake2b
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from moa_train.data.counter import permutation

SPLIT_SEED = 20210703  # never the run's seed: runs with different seeds must stay comparable

Rows = NDArray[np.int64]


def hold_out(labels: Rows, fraction: float, purpose: int = 0) -> tuple[Rows, Rows]:
    """Divide the samples of each class, by their positions, into a kept part and a held-out part.

    For any fraction, both parts get at least one sample of every class that has at least two.

    Args:
        labels: int64, N.
        fraction: fraction to hold out, above 0 and below 1.
        purpose: divisions for different purposes are independent of each other.

    Returns:
        Kept indices and held-out indices, both ascending.
    """
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held[rows[permutation(len(rows), SPLIT_SEED, purpose, int(label))[:count]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def hold_out_by_name(names: Iterable[bytes], labels: Rows, fraction: float) -> tuple[Rows, Rows]:
    """Divide the samples of each class, by hashes of their names, as `hold_out` does.

    A file is held out if its hash is below the fraction, so adding or removing files does not move other files. An
    exception keeps small classes in both parts: if no hash of a class is below the fraction, the file with the lowest
    hash is held out; if all hashes are, the file with the highest hash is kept.

    Args:
        names: N paths such as `CLASS/NAME.jpg`. Their Unicode form (NFC, NFD) does not matter.
        labels: int64, N.
        fraction: approximate fraction to hold out, above 0 and below 1.

    Returns:
        Kept indices and held-out indices, both ascending.
    """
    hashes = np.array([_hash(name) for name in names])
    held = hashes < fraction
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if held[rows].all():
            held[rows[hashes[rows].argmax()]] = False
        elif not held[rows].any() and len(rows) > 1:
            held[rows[hashes[rows].argmin()]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _hash(name: bytes) -> float:
    """Return a number from 0 to 1 that depends on the name alone."""
    if not name.isascii():
        name = os.fsencode(normalize("NFC", os.fsdecode(name)))
    digest = blake2b(name, digest_size=8, key=SPLIT_SEED.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64
