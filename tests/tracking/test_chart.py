"""Curves in the terminal."""

import math

from moa_train.tracking.chart import chart


def test_a_straight_line():
    drawn = chart({"lr": [(0, 0.0), (6, 3.0)]}, width=15, height=4, x_label="steps")
    assert drawn.splitlines() == [
        "3 |          **",
        "  |      ****",
        "  |  ****",
        "0 |**",
        "  +------------",
        "   0    6 steps",
    ]


def test_curves_have_their_own_marks_and_gaps():
    drawn = chart({"a": [(0, 1.0), (1, math.nan)], "b": [(1, 2.0)], "none": []}, width=20, height=3)
    assert drawn.count("*") == 2  # with the legend
    assert drawn.count("o") == 3
    assert drawn.splitlines()[-3:] == ["  * a", "  o b", "  + none"]


def test_no_values():
    assert chart({"a": [(0, math.nan)]}) == "(no values yet)"


def test_constant_curves_have_a_range():
    assert "*" in chart({"a": [(0, 5.0), (10, 5.0)]})
    assert "*" in chart({"a": [(3, 0.0)]})
