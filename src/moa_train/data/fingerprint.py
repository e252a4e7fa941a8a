"""Fingerprints of data, by which a resumed run detects that its data has changed."""

import hashlib
import json
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Labels: TypeAlias = NDArray[np.int64]


def fingerprint(title: str, classes: Sequence[str], labels: Labels, *facts: object) -> str:
    """Return a stable hash of a split: 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([title, list(classes), len(labels)]).encode())
    digest.update(np.ascontiguousarray(labels, "<i8").tobytes())
    for fact in facts:
        digest.update(fact.astype("<i8").tobytes() if isinstance(fact, np.ndarray) else repr(fact).encode())
    return digest.hexdigest()[:16]
