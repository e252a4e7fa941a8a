import numpy as np
import pytest

from moa_train.data.split import hold_out
from moa_train.runtime.errors import UserError


def labels_of(*counts: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def test_parts_are_disjoint_complete_and_stratified() -> None:
    labels = labels_of(100, 50, 10)
    kept, held = hold_out(labels, 0.2)
    assert sorted([*kept, *held]) == list(range(160))
    assert np.bincount(labels[held]).tolist() == [20, 10, 2]


def test_every_class_keeps_one_and_gives_one() -> None:
    labels = labels_of(2, 3, 1)
    kept, held = hold_out(labels, 0.01)
    assert np.bincount(labels[kept], minlength=3).tolist() == [1, 2, 1]  # a class of one is only trained on
    assert np.bincount(labels[held], minlength=3).tolist() == [1, 1, 0]
    kept, held = hold_out(labels, 0.99)
    assert np.bincount(labels[kept], minlength=3).tolist() == [1, 1, 1]


def test_the_part_is_always_the_same_and_differs_by_purpose() -> None:
    labels = labels_of(40, 40)
    assert np.array_equal(hold_out(labels, 0.25)[1], hold_out(labels, 0.25)[1])
    assert not np.array_equal(hold_out(labels, 0.25)[1], hold_out(labels, 0.25, purpose=1)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_outside_of_the_range_are_errors(fraction: float) -> None:
    with pytest.raises(UserError, match="val_fraction"):
        hold_out(labels_of(4), fraction)
