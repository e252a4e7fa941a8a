"""Images that are probably labeled wrongly, by confident learning (Northcutt et al., arXiv 1911.00068)."""

import numpy as np
from numpy.typing import NDArray


def label_errors(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the images whose labels are probably wrong, the least plausible label first.

    An image is confidently of class j if its probability of j is at least the mean probability of j among the images
    that are labeled j. If neither that class nor the most likely one is the label, the label is probably wrong.
    This selects the same images as cleanlab's ``filter_by="confident_learning"``. cleanlab itself is not used, because
    its import alone takes an eighth of the time in which a small model evaluates 10,000 CIFAR images.

    Args:
        probabilities: out-of-sample probabilities, (N, K): from a model that was not trained on these images.
        labels: (N,); every class occurs.
    """
    classes = probabilities.shape[1]
    own = np.take_along_axis(probabilities, labels[:, None], 1)[:, 0]
    thresholds = np.bincount(labels, own, classes) / np.bincount(labels, minlength=classes)
    confident = probabilities >= thresholds - 1e-6
    likely = probabilities.argmax(1)
    chosen = np.where(confident.sum(1) > 1, likely, np.where(confident, probabilities, 0.0).argmax(1))
    suspect = confident.any(1) & (chosen != labels) & (likely != labels)
    rows = np.flatnonzero(suspect)
    return rows[np.argsort(own[rows], kind="stable")]
