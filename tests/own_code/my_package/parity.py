"""A data set: scikit-learn's handwritten digits, labeled odd or even."""

import numpy as np

from moa_train.data.dataset import DataSet
from moa_train.data.source import Source


class Parity(DataSet):
    mean, std = (0.309, 0.309, 0.309), (0.349, 0.349, 0.349)
    num_classes = 2  # optional: lets moa-model summary describe a model without opening the data

    def read(self, split: str) -> Source:
        from sklearn.datasets import load_digits

        digits = load_digits()
        part = slice(1400, None) if split == "test" else slice(0, 1400)
        images = (digits.images[part] * (255 / 16)).astype(np.uint8)[:, None]  # N C H W; one channel becomes three
        return self.from_arrays(split, images, digits.target[part] % 2, ["even", "odd"])
