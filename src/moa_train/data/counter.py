"""Random numbers without state: a hash of the words that name a draw.

A sample's randomness is a function of (seed, epoch, index, repeat, purpose) and of nothing else, so it is the same
whichever worker or rank draws it, in whatever batch, before or after a resume. NumPy on the host computes it: the
numbers decide which images go through which operation, and asking a device for them would make the host wait.

The hash chains the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014), a bijection of 64-bit words: keys that differ in the last word only never collide.
"""

from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Word: TypeAlias = int | NDArray[np.integer]
Hashes: TypeAlias = NDArray[np.uint64]
Floats: TypeAlias = NDArray[np.float64]
Whole: TypeAlias = NDArray[np.int64]


class Purpose(IntEnum):
    """The word after a sample's key: what a draw is for. Values are part of a run's identity; never renumber them.

    2 was used once. Your own augmentations use numbers from 1000.
    """

    FILE_CROP = 1
    CROP = 3
    FLIP = 4
    RANDAUGMENT = 5
    JITTER = 6
    ERASING = 7
    ERASING_BOX = 8


_GOLDEN = np.array(0x9E3779B97F4A7C15, np.uint64)
_MULTIPLIERS = np.array(0xBF58476D1CE4E5B9, np.uint64), np.array(0x94D049BB133111EB, np.uint64)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def hashes(*words: Word) -> Hashes:
    """Hash the words, which broadcast against each other like any arrays, to 64 uniform bits each."""
    state = np.zeros((1,), np.uint64)  # never a scalar: NumPy warns of wrap-around in scalars only
    for word in words:
        state = _finalise((state + _GOLDEN) ^ np.asarray(word).astype(np.uint64))
    return state


def sample_keys(seed: int, epoch: Word, index: Word, repeat: Word) -> Hashes:
    """Return the key of each sample's randomness: the first word of all its draws, before a ``Purpose``."""
    return hashes(seed, epoch, index, repeat)


def uniform(*words: Word) -> Floats:
    """Return float64 in [0, 1), a multiple of 2**-53, for each combination of the words."""
    return (hashes(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(*words: Word) -> Floats:
    """Return standard normal float64 (Box and Muller, 1958)."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(*words, 0)))
    return radius * np.cos(2.0 * np.pi * uniform(*words, 1))


def permutation(length: int, *words: Word) -> NDArray[np.int64]:
    """Return a permutation of ``range(length)``: the order of the hashes of (words, position)."""
    return np.argsort(hashes(*words, np.arange(length)), kind="stable").astype(np.int64)


def _finalise(state: Hashes) -> Hashes:
    state = (state ^ (state >> _SHIFTS[0])) * _MULTIPLIERS[0]
    state = (state ^ (state >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return state ^ (state >> _SHIFTS[2])
