import numpy as np
import pytest

from moa_train.data.split import hold_out, hold_out_by_name


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


def names_of(labels: np.ndarray) -> list[bytes]:
    return [b"class%d/%05d.jpg" % (label, row) for row, label in enumerate(labels)]


def test_parts_by_name_are_disjoint_complete_and_nearly_stratified() -> None:
    labels = labels_of(4000, 1000, 5, 1)
    kept, held = hold_out_by_name(names_of(labels), labels, 0.1)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=4)[:2] == pytest.approx([400, 100], rel=0.25)
    for fraction in (0.001, 0.999):
        kept, held = hold_out_by_name(names_of(labels), labels, fraction)
        assert np.bincount(labels[kept], minlength=4).min() >= 1  # a class of one is only trained on
        assert np.bincount(labels[held], minlength=4)[:3].min() >= 1


def test_a_name_decides_alone() -> None:
    labels = np.repeat(np.arange(3), 200)
    names = names_of(labels)
    held = {names[row] for row in hold_out_by_name(names, labels, 0.2)[1]}
    order = np.random.default_rng(0).permutation(600)[:450]
    some = [names[row] for row in order]
    again = {some[row] for row in hold_out_by_name(some, labels[order], 0.2)[1]}
    assert again == held & set(some)
    larger = {names[row] for row in hold_out_by_name(names, labels, 0.4)[1]}
    assert larger > held


def test_the_unicode_form_of_a_name_makes_no_difference() -> None:
    labels = np.zeros(100, np.int64)
    composed = [f"\xe4/{number}".encode() for number in range(100)]
    decomposed = [f"a\u0308/{number}".encode() for number in range(100)]
    other = [b"\xe4/%d" % number for number in range(100)]  # not UTF-8
    assert np.array_equal(hold_out_by_name(composed, labels, 0.3)[1], hold_out_by_name(decomposed, labels, 0.3)[1])
    assert not np.array_equal(hold_out_by_name(composed, labels, 0.3)[1], hold_out_by_name(other, labels, 0.3)[1])
