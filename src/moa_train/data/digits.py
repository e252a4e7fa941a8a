"""The digits of scikit-learn: 1,797 real scans of handwritten digits, which ship with the library."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from moa_train.data.arrays import ArraySource
from moa_train.data.split import hold_out

TEST_FRACTION = 0.2


def open_digits(split: str, image_size: tuple[int, int]) -> ArraySource:
    """Open the part that trains (four fifths of each class) or the ``test`` part (the other fifth).

    The scans are 8 x 8 with 17 levels of grey. They are kept like that and enlarged, with three equal channels, as
    batches are gathered.
    """
    table = _read()
    images = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[:, None]
    labels = table[:, 64].astype(np.int64)
    rest, test = hold_out(labels, TEST_FRACTION, purpose=1)
    classes = [str(digit) for digit in range(10)]
    return ArraySource(f"digits/{split}", images, labels, classes, image_size, test if split == "test" else rest)


def _read() -> np.ndarray:
    """Return 64 levels and a label for each scan, shape (1797, 65)."""
    # Importing scikit-learn takes as long as importing torch, and load_digits() does no more than this.
    package = find_spec("sklearn")
    path = Path(package.origin if package and package.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # where it keeps the file elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])
