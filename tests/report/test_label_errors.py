"""Label errors agree with cleanlab, and wrong labels are found."""

import numpy as np
import pytest

from moa_train.report.label_errors import label_errors


def noisy(count: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, count)
    logits = generator.normal(size=(count, classes))
    logits[np.arange(count), labels] += 3
    given = np.where(generator.random(count) < 0.05, generator.integers(0, classes, count), labels)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), given, np.flatnonzero(given != labels)


@pytest.mark.parametrize(("count", "classes"), [(1000, 3), (5000, 50)])
@pytest.mark.filterwarnings("ignore")  # of libraries that cleanlab imports
def test_the_same_images_as_cleanlab_in_the_same_order(count, classes):
    cleanlab = pytest.importorskip("cleanlab.filter")
    probabilities, labels, _ = noisy(count, classes)
    expected = cleanlab.find_label_issues(
        labels, probabilities, return_indices_ranked_by="self_confidence", filter_by="confident_learning", n_jobs=1
    )
    found = label_errors(probabilities, labels)
    assert set(found) == set(expected)
    own = probabilities[found, labels[found]]
    assert (np.diff(own) >= 0).all()


def test_wrong_labels_come_first():
    probabilities, labels, wrong = noisy(2000, 10)
    found = label_errors(probabilities, labels)
    assert np.isin(found[:40], wrong).mean() > 0.8
    assert np.isin(wrong, found).mean() > 0.6
