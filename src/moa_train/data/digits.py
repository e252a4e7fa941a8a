"""scikit-learn's digits: 1,797 scans of handwritten digits, which are part of the library's package."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.data.dataset import DataSet

if TYPE_CHECKING:
    import numpy as np

    from moa_train.data.source import Source

TEST_FRACTION = 0.2


class Digits(DataSet):
    """Scans of 8 x 8 pixels with 17 gray levels, enlarged to the image size when batches are gathered."""

    mean = (0.309, 0.309, 0.309)
    std = (0.349, 0.349, 0.349)
    num_classes = 10

    def read(self, split: str) -> "Source":
        """Open the training part (four fifths of each class) or the test part (the other fifth)."""
        import numpy as np

        from moa_train.data.split import hold_out

        table = _read()
        images = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[:, None]
        labels = table[:, 64].astype(np.int64)
        rest, test = hold_out(labels, TEST_FRACTION, purpose=1)
        classes = [str(digit) for digit in range(10)]
        rows = test if split == "test" else rest
        return self.from_arrays(split, images, labels, classes, rows)


def _read() -> "np.ndarray":
    """Return 64 gray levels and a label for each scan, shape (1797, 65)."""
    import numpy as np

    # Importing scikit-learn takes as long as importing torch, and load_digits() would only read the same file.
    package = find_spec("sklearn")
    path = Path(package.origin if package and package.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # for a version that stores the file elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])
