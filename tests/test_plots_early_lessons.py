"""The figures that lessons 01 and 02 add show the numbers they were given, and all of them."""

from __future__ import annotations

from itertools import pairwise

from course_lib.plots.bars import next_token_figure
from course_lib.plots.curves import curves_figure
from course_lib.plots.heat import heat_map
from course_lib.plots.lora import kept_figure, lora_run_figure, sweep_figure
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
    assert words == ("T: good mask: right 25%, stopped 100%; bad mask: right 0%, stopped 50%.")


def test_the_cut_change_is_drawn_by_rank_with_its_improvement_and_its_energy():
    figure = kept_figure([0, 1, 4], [0.0, 0.3, 0.6], [0.0, 0.7, 1.02], "T")
    axes = figure.axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {"improvement kept": [0.0, 0.7, 1.02], "energy kept": [0.0, 0.3, 0.6]}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "4"]
    assert axes.get_ylim()[1] > 1.02
    assert "rank 4: 102% and 60%" in description(figure)


def test_a_run_that_was_judged_every_fourth_step_is_drawn_at_those_steps():
    runs = {(1, 32.0, 1e-3): [2.0, 1.5, 1.0, 0.9], (1, 32.0, 1e-2): [2.0, 1.0, 0.5, 0.4]}
    left, _ = lora_run_figure(runs, (1, 32.0, 1e-2), every=4).axes
    assert all(list(line.get_xdata()) == [0, 4, 8, 12] for line in left.lines)
    assert all(tick == round(tick) for tick in left.get_xticks())  # there is no step 2.5


def test_the_name_of_a_level_stands_clear_of_a_line_that_runs_along_it():
    figure = curves_figure({"a": [1.0, 1.0], "b": [3.0, 3.0]}, "T", "y", level=(1.0, "the truth"))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    level = axes.transData.transform((1, 1.0))[1]
    mark = axes.lines[0].get_markersize() / 2 * figure.dpi / 72
    assert axes.texts[0].get_window_extent().y0 > level + mark


def test_the_words_on_next_tokens_speak_of_those_that_are_shown():
    """A token that is not shown may be likelier than all that are."""
    words = description(next_token_figure(["2", "The"], [0.01, 0.2], [0.9, 0.01], "T"))
    assert words == "T: the likeliest of these before: The; after: 2."


def test_a_run_that_ends_high_leaves_the_low_ones_room():
    """On a linear scale one loss of 5 nats pressed all the others together."""
    axes = sweep_figure({(1, 1e-3): 1.0, (1, 1e-2): 0.5, (1, 1e-1): 5.0}).axes[0]
    low, middle, high = (axes.transData.transform((1e-3, loss))[1] for loss in (0.5, 1.0, 5.0))
    assert (middle - low) / (high - low) > 0.25


def test_the_names_of_many_columns_do_not_overlap():
    """Turned by 60 degrees, "answer" was written across "is"."""
    names = ["a", "an answer", "is", "<|end|>"] * 7
    figure = heat_map([[0.0] * 28, [1.0] * 28], "T", "token", "", "nats", columns=names)
    figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
