"""Held-out parts of a data set: stratified, and the same for every run."""

import os
from collections.abc import Iterable
from hashlib import blake2b
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from moa_train.data.counter import permutation
from moa_train.runtime.errors import UserError

SPLIT_SEED = 20210703  # never the run's seed: runs with different seeds must stay comparable

Rows = NDArray[np.int64]


def hold_out(labels: Rows, fraction: float, purpose: int = 0) -> tuple[Rows, Rows]:
    """Divide the samples of each class, by their positions, into a part that stays and a part that is held out.

    Every class with at least two samples keeps at least one and gives at least one, whatever the fraction.

    Args:
        labels: int64, N.
        fraction: part held out, above 0 and below 1.
        purpose: divisions for different purposes are independent of each other.

    Returns:
        Indices that stay and indices held out, both ascending.
    """
    _check_fraction(fraction)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held[rows[permutation(len(rows), SPLIT_SEED, purpose, int(label))[:count]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def hold_out_by_name(names: Iterable[bytes], labels: Rows, fraction: float) -> tuple[Rows, Rows]:
    """Divide the samples of each class, by hashes of their names, as `hold_out` does.

    A file is held out if its hash lies below the fraction, so adding or removing files moves no other file. (One
    exception keeps small classes in both parts: if no hash of a class lies below, the file with the lowest is held
    out; if all do, the file with the highest stays.)

    Args:
        names: N paths, as `CLASS/NAME.jpg`. Their Unicode form (NFC, NFD) makes no difference.
        labels: int64, N.
        fraction: part held out, above 0 and below 1; of large classes it is met approximately.

    Returns:
        Indices that stay and indices held out, both ascending.
    """
    _check_fraction(fraction)
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


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction={fraction}: must be above 0 and below 1. Usual: val_fraction=0.1.")
