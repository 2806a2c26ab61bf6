"""The bars of a shares figure are the numbers it was given, in the order it was given them."""

from __future__ import annotations

from course_lib.plots.shares import shares_figure
from course_lib.plots.words import description

SHARES = {"right": [0.25, 0.0], "stopped": [1.0, 0.5]}


def test_each_bar_is_as_long_as_its_share():
    axes = shares_figure(["good mask", "bad mask"], SHARES, "T").axes[0]
    lengths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert lengths == [[0.25, 0.0], [1.0, 0.5]]


def test_the_first_measure_stands_above_the_second_within_each_name():
    axes = shares_figure(["good mask", "bad mask"], SHARES, "T").axes[0]
    first, second = (
        [bar.get_y() + bar.get_height() / 2 for bar in bars] for bars in axes.containers
    )
    assert axes.yaxis_inverted()  # a smaller y stands higher
    assert all(one < other for one, other in zip(first, second, strict=True))
    assert round(first[0], 6) == -0.2 and round(second[1], 6) == 1.2


def test_the_words_tell_every_number():
    words = description(shares_figure(["good mask", "bad mask"], SHARES, "T"))
    assert words == ("T. good mask: right 25%, stopped 100%; bad mask: right 0%, stopped 50%.")
