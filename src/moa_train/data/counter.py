"""Random numbers without state: each is a hash of the integers ("words") that name it.

A sample's random numbers depend only on (seed, epoch, index, repeat, purpose). They are the same for every worker,
rank and batch, and after a resume. They are computed by NumPy on the host, because they decide which images go through
which operation: reading such decisions from a device would make the host wait for it.

In your own augmentation, number the draws and append the number to the keys that it receives, one per sample (B)::

    uniform(keys, 0) < 0.5                          # a decision per sample, (B,)
    normal(keys, 1)                                 # a normal number per sample, (B,)
    uniform(keys[:, None], 2, np.arange(3))         # three numbers per sample, (B, 3)

These keys are derived from the name of the augmentation (`own_keys`), so the numbers are independent of those of the
built-in operations and of other augmentations.

The hash chains the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014), a bijection of 64-bit words: keys that differ only in the last word never collide.
"""

import hashlib
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Word: TypeAlias = int | NDArray[np.integer]
Hashes: TypeAlias = NDArray[np.uint64]
Floats: TypeAlias = NDArray[np.float64]
Whole: TypeAlias = NDArray[np.int64]


class Purpose(IntEnum):
    """The word after a sample's key: the purpose of a random number.

    The values are part of a run's identity: never renumber them, and never use 2 again.
    """

    FILE_CROP = 1
    CROP = 3
    FLIP = 4
    RANDAUGMENT = 5
    JITTER = 6
    ERASING = 7
    ERASING_BOX = 8
    OWN = 9


_GOLDEN = np.array(0x9E3779B97F4A7C15, np.uint64)
_MULTIPLIERS = np.array(0xBF58476D1CE4E5B9, np.uint64), np.array(0x94D049BB133111EB, np.uint64)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def hashes(*words: Word) -> Hashes:
    """Return 64 uniform bits for each combination of the words, which broadcast against each other."""
    state = np.zeros((1,), np.uint64)  # an array, because NumPy warns about overflow of scalars
    for word in words:
        state = _finalize((state + _GOLDEN) ^ np.asarray(word).astype(np.uint64))
    return state


def sample_keys(seed: int, epoch: Word, index: Word, repeat: Word) -> Hashes:
    """Return the key of each sample: the first word of all its random numbers; the second is a `Purpose`."""
    return hashes(seed, epoch, index, repeat)


def own_keys(keys: Hashes, name: str) -> Hashes:
    """Return the keys of the samples for a user's own augmentation with this name."""
    return hashes(keys, Purpose.OWN, int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()))


def uniform(*words: Word) -> Floats:
    """Return float64 in [0, 1), a multiple of 2**-53, for each combination of the words."""
    return (hashes(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(*words: Word) -> Floats:
    """Return standard normal float64 (Box and Muller, 1958)."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(*words, 0)))
    return radius * np.cos(2.0 * np.pi * uniform(*words, 1))


def permutation(length: int, *words: Word) -> NDArray[np.int64]:
    """Return a permutation of ``range(length)``: positions sorted by the hash of (words, position)."""
    return np.argsort(hashes(*words, np.arange(length)), kind="stable").astype(np.int64)


def _finalize(state: Hashes) -> Hashes:
    state = (state ^ (state >> _SHIFTS[0])) * _MULTIPLIERS[0]
    state = (state ^ (state >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return state ^ (state >> _SHIFTS[2])
