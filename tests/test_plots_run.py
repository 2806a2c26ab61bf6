"""The figures of a run show the numbers of the run, and everybody can read them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from course_lib.errors import CourseError
from course_lib.plots import style
from course_lib.plots.run import accuracy_figure, reward_figure, series, sft_loss_figure
from course_lib.plots.words import span

ROWS = [
    {"phase": "sft", "step": 1, "train/nll": 2.0},
    {"phase": "sft", "step": 2, "train/nll": 1.0, "test/nll": 1.25},
    {"phase": "rl", "step": 1, "reward/total": 0.25, "env/worked_share": 0.0},
    {"phase": "rl", "step": 2, "reward/total": 0.75, "env/worked_share": 0.5},
]
for row in ROWS[2:]:
    row |= {"env/dead_groups": 1 * row["step"], "env/groups": 4}
REPORT = {
    "base": {"accuracy": 0.0, "interval": [0.0, 0.0], "worked_share": 0.0},
    "sft": {"accuracy": 0.25, "interval": [0.125, 0.5], "worked_share": 0.5},
    "rl": {"accuracy": 1.0, "interval": [0.75, 1.0], "worked_share": 1.0},
}


def every_figure():
    return [sft_loss_figure(ROWS), reward_figure(ROWS), accuracy_figure(REPORT)]


def test_the_loss_figure_plots_each_steps_loss_and_each_heldout_loss():
    each, mean, heldout = sft_loss_figure(ROWS).axes[0].lines

    assert each.get_xydata().tolist() == [[1, 2.0], [2, 1.0]]
    assert mean.get_xydata().tolist() == [[1, 2.0], [2, 1.0]]  # neighbours on one side only
    assert heldout.get_xydata().tolist() == [[2, 1.25]]


def test_the_reward_figure_plots_reward_worked_answers_and_dead_groups():
    top, bottom = reward_figure(ROWS).axes

    assert top.lines[0].get_ydata().tolist() == [0.25, 0.75]
    assert bottom.lines[0].get_ydata().tolist() == [0.0, 0.5]
    assert bottom.lines[-1].get_ydata().tolist() == [0.25, 0.5]  # 1 of 4 groups, then 2 of 4


def test_the_bars_and_intervals_are_those_of_the_report():
    left, right = accuracy_figure(REPORT).axes
    (interval,) = left.containers[3].lines[2]  # bars of base and sft, their intervals, ...

    assert [bar.get_height() for bar in left.patches] == [0.0, 0.25, 1.0]
    assert [bar.get_height() for bar in right.patches] == [0.0, 0.5, 1.0]
    assert interval.get_segments()[0][:, 1].tolist() == [0.125, 0.5]


def test_a_stage_that_was_not_run_has_no_bar():
    left, _ = accuracy_figure({"base": REPORT["base"], "sft": REPORT["sft"], "rl": None}).axes

    assert [tick.get_text() for tick in left.get_xticklabels()] == ["base", "SFT"]


def test_a_run_without_checkable_answers_has_no_accuracy_figure():
    with pytest.raises(CourseError, match="no accuracy"):
        accuracy_figure({"base": {"accuracy": None}})


def test_a_phase_that_did_not_run_is_named():
    with pytest.raises(CourseError, match="no row of phase 'rl' holds 'reward/total'"):
        series(ROWS[:2], "rl", "reward/total")


@pytest.mark.parametrize("index", range(3))
def test_no_text_is_cut_off(index: int):
    figure = every_figure()[index]
    figure.draw_without_rendering()  # runs the layout
    drawn = figure.get_tightbbox()  # inches, of everything that is drawn

    assert drawn.x0 >= 0 and drawn.y0 >= 0
    assert drawn.x1 <= figure.get_figwidth() and drawn.y1 <= figure.get_figheight()


def test_axes_carry_names_with_units():
    assert sft_loss_figure(ROWS).axes[0].get_ylabel() == "loss (nats per token)"
    assert sft_loss_figure(ROWS).axes[0].get_xlabel() == "optimizer step"


def test_there_are_no_half_steps():
    for axes in (sft_loss_figure(ROWS).axes[0], reward_figure(ROWS).axes[1]):
        assert all(tick == int(tick) for tick in axes.get_xticks())


def grey(colour: str) -> float:
    """Luminance from 0 to 1, as a grey printer sees it."""
    return float(np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722]))


def test_the_stages_differ_in_grey_or_in_hatch():
    for one, other in combinations(style.STAGES, 2):
        greys = abs(grey(style.STAGE_COLOURS[one]) - grey(style.STAGE_COLOURS[other]))
        assert greys > 0.2 or style.STAGE_HATCHES[one] != style.STAGE_HATCHES[other]


def test_lines_differ_in_dash_and_marker_so_that_colour_is_never_alone():
    assert len(set(style.DASHES)) == len(set(style.MARKERS)) == len(style.CYCLE)


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_stages_are_told_apart_by_colour_blind_readers(kind: str):
    seen = {
        stage: np.array(BLINDNESS[kind]) @ (np.array(to_rgb(colour)) ** 2.2)
        for stage, colour in style.STAGE_COLOURS.items()
    }
    for one, other in combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 0.2


def test_a_saved_figure_is_opaque_white_and_describes_itself(tmp_path: Path):
    path = style.save_figure(sft_loss_figure(ROWS), tmp_path / "new" / "loss.png", "loss falls")

    with Image.open(path) as image:
        assert image.info["Description"] == "loss falls"
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_the_moving_average_does_not_shift_a_slope():
    line = [float(value) for value in range(20)]

    assert style.moving_average(line, window=9) == line


def test_a_figure_leaves_matplotlibs_settings_as_they_were():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    sft_loss_figure(ROWS)

    assert dict(mpl.rcParams) == before


def test_a_notebook_shows_a_figure_as_a_picture():
    assert sft_loss_figure(ROWS)._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([5.125, 0.324], "from 5.12 to 0.324"),
        ([-2.8e-08, 0.5, 1.93], "from 0 to 1.93"),  # what rounding left of a KL of zero
        ([0.001, 1.93], "from 0.001 to 1.93"),
        ([1e-8, 3e-8], "from 1e-08 to 3e-08"),
        ([0.0, 0.0], "from 0 to 0"),
        ([0.5, 0.84, 0.33], "from 0.5 to 0.33, highest 0.84"),
        ([0.0, -5.0, 2.0, 1.0], "from 0 to 1, lowest -5"),
        ([0.0, 1.1, 1.0], "from 0 to 1"),  # hardly beyond the end
        ([], "without values"),
    ],
)
def test_a_description_says_where_a_curve_begins_and_ends_without_the_noise_of_rounding(
    values: list[float], words: str
):
    assert span(values) == words
