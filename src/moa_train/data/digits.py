"""The digits of scikit-learn: 1,797 real scans of handwritten digits, which ship with the library."""

import numpy as np

from moa_train.data.arrays import ArraySource
from moa_train.data.split import hold_out

TEST_FRACTION = 0.2


def open_digits(split: str, image_size: tuple[int, int]) -> ArraySource:
    """Open the part that trains (four fifths of each class) or the ``test`` part (the other fifth).

    The scans are 8 x 8 with 17 levels of grey. They are kept like that and enlarged, with three equal channels, as
    batches are gathered.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    rest, test = hold_out(digits.target.astype(np.int64), TEST_FRACTION, purpose=1)
    rows = test if split == "test" else rest
    return ArraySource(
        f"digits/{split}", images, digits.target, [str(name) for name in digits.target_names], image_size, rows
    )
