"""The pictures of lesson 04: a judge's calibration, and a reward beside the truth."""

from __future__ import annotations

from course_lib.plots.heat import heat_map
from course_lib.plots.preferences import arms_figure, calibration_figure
from course_lib.plots.words import description

BINS = [(0.55, 0.5, 4), (0.9, 0.75, 16)]
ARMS = {"gamed": ([0.1, 0.5, 1.0], [0.4, 0.8, 0.3]), "repaired": ([0.2, 1.1, 1.2], [0.4, 0.9, 1])}
FIGURES = {"calibration": calibration_figure(BINS, "T"), "arms": arms_figure(ARMS, "T")}


def test_each_bin_of_a_judge_is_one_mark_with_its_count():
    axes = FIGURES["calibration"].axes[0]
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in marks] == [(0.55, 0.5), (0.9, 0.75)]
    assert [text.get_text() for text in axes.texts] == ["4", "16"]
    assert marks[1].get_markersize() > marks[0].get_markersize()


def test_the_honest_judge_is_the_diagonal():
    line = FIGURES["calibration"].axes[0].lines[0]
    assert list(line.get_xdata()) == list(line.get_ydata()) == [0.5, 1]


def test_each_arm_has_a_panel_with_what_was_paid_and_what_was_wanted():
    panels = FIGURES["arms"].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["gamed", "repaired"]
    for axes, (paid, wanted) in zip(panels, ARMS.values(), strict=True):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert drawn == {"reward": paid, "true quality": wanted}
        assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
        assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


def test_the_arms_share_one_scale_from_zero_in_which_every_point_is_seen():
    """The scale was fixed when the first panel was drawn, and cut the second one's curves off."""
    limits = {axes.get_ylim() for axes in FIGURES["arms"].axes}
    assert len(limits) == 1
    low, high = limits.pop()
    assert low == 0
    assert high > max(max(paid + wanted) for paid, wanted in ARMS.values())


def test_two_heat_maps_with_the_same_limits_share_their_colours():
    """A judge that always says 0.998 was drawn in every colour, as if it had opinions."""
    figure = heat_map([[0.998, 0.999]], "T", "x", "y", "P", limits=(0, 1))
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    plain = heat_map([[0.998, 0.999]], "T", "x", "y", "P")
    assert plain.axes[0].images[0].get_clim() == (0.998, 0.999)


def test_the_words_give_the_ends_of_every_curve():
    assert "gamed: reward from 0.1 to 1, true quality from 0.4 to 0.3" in description(
        FIGURES["arms"]
    )
    assert "90% sure, 75% right (16)" in description(FIGURES["calibration"])
