"""Comparisons: exact values, and that pairing sees what overlapping intervals hide."""

import pytest

from course_lib.comparison import compare, pass_at, sign_test
from course_lib.errors import CourseError
from course_lib.evaluation import Evaluation, Record


def evaluation(correct_P_G):
    records = [
        Record(str(p), "", "", [""] * len(row), [float(c) for c in row], [], [], [], [])
        for p, row in enumerate(correct_P_G)
    ]
    accuracy = sum(sum(row) / len(row) for row in correct_P_G) / len(correct_P_G)
    return Evaluation(accuracy, (0, 1), None, 0, 0, 1.0, len(correct_P_G[0]), records)


def test_pass_at_k_is_the_mean_over_problems():
    found = pass_at(evaluation([[1, 1, 0, 0], [0, 0, 0, 0]]), k=2)
    assert found.value == pytest.approx((5 / 6 + 0) / 2)  # 1 of 6 pairs of the first is all wrong
    assert found.interval[0] <= found.value <= found.interval[1]


def test_a_paired_comparison_by_hand():
    before = evaluation([[1], [0], [0], [1], [0]])
    after = evaluation([[1], [1], [1], [0], [0]])
    found = compare(before, after)
    assert found.difference == pytest.approx(0.2)
    assert (found.better, found.worse) == (2, 1)
    assert found.p_value == 1.0
    assert "could be luck" in str(found)
    assert compare(after, before).difference == pytest.approx(-0.2)


def test_pairing_sees_what_overlapping_intervals_hide():
    # 40 of 100 against 52 of 100: the two intervals overlap, but nothing ever got worse
    before = evaluation([[1]] * 40 + [[0]] * 60)
    after = evaluation([[1]] * 52 + [[0]] * 48)
    found = compare(before, after)
    assert found.interval[0] > 0 and found.p_value < 0.001
    assert str(found).startswith("+12.0 points [") and "is hardly luck" in str(found)


def test_few_disagreements_could_be_luck_even_where_the_bootstrap_is_sure():
    found = compare(evaluation([[0]] * 60), evaluation([[1]] * 4 + [[0]] * 56))
    assert found.interval[0] > 0 and found.p_value == 0.125
    assert "could be luck" in str(found)


def test_the_sign_test_is_exact():
    assert sign_test(0, 0) == 1.0
    assert sign_test(3, 0) == sign_test(0, 3) == 0.25  # 2 of 8
    assert sign_test(8, 1) == pytest.approx(20 / 512)


def test_different_problems_cannot_be_compared():
    with pytest.raises(CourseError, match="different problems"):
        compare(evaluation([[1]]), evaluation([[1], [0]]))
