"""Every figure of the lessons shows the numbers it was given, in words as well as in ink."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import random

import numpy as np
import pytest

from course_lib import plots
from course_lib.plots import (
    bars,
    chat,
    clinic,
    curves,
    estimators,
    groups,
    heat,
    lora,
    preferences,
    ratios,
    scatter,
    seeds,
    shares,
)
from course_lib.plots import merge as merges
from course_lib.plots import serving as servings
from course_lib.plots.tokens import LINE, layout, shown, token_strip, value_strip
from course_lib.plots.words import description

TOKENS = ["<|user|>", "What", " is", " 2+3", "?", "<|end|>", "<|assistant|>", " 5", "<|end|>"]
WEIGHTS = [0.0] * 7 + [1.0, 1.0]
ROWS = [
    {
        "step": 1,
        "reward/total": 0.25,
        "env/dead_groups": 3,
        "env/groups": 4,
        "ratio/max_deviation": 0,
    },
    {"step": 2, "reward/total": 0.5, "env/dead_groups": 1, "env/groups": 4},
]
RUNS = {(8, 16.0, 1e-3): [2.0, 1.0], (8, 16.0, 1e-2): [2.0, 0.5], (4, 16.0, 1e-3): [2.0, 1.5]}


def every_figure():
    """One of each, by name, with data that exercises its branches."""
    rng = random.Random(0)
    return {
        "token_strip": token_strip(TOKENS, WEIGHTS, "Trained on"),
        "value_strip": value_strip(TOKENS, [0.0] * 7 + [0.5, -0.25]),
        "curves": curves.curves_figure(
            {"a": [3, 2], "b": [4, 1]}, "T", "loss", level=(6.9, "ln V")
        ),
        "two_curves": curves.two_curves_figure([1, 2], [4, 3], ("reward", "length"), "T"),
        "live_rl": curves.live_figure(ROWS, 5),
        "live_sft": curves.live_figure([{"step": 1, "train/nll": 2.0, "test/nll": 2.5}], 5),
        "live_empty": curves.live_figure([], 5),
        "heat": heat.heat_map([[0.0, 1.0], [0.5, 0.25]], "T", "x", "y", "reward"),
        "heat_signed": heat.heat_map([[-2.0, 1.0]], "T", "x", "y", "A", signed=True, columns="ab"),
        "next_token": bars.next_token_figure([" 5", " 7"], [0.1, 0.9], [0.8, 0.001]),
        "stacked": bars.stacked_figure(["a", "b"], {"p": [1, 0], "q": [-0.5, 0.25]}, "T", "reward"),
        "counts": bars.counts_figure([1.0, 2.0, 2.0], "T", "tokens", bins=2, marks={"median": 2.0}),
        "ratio_histogram": ratios.ratio_histogram([0.5, 1.0, 1.5, 1.5], [-1, 1, 1, -1]),
        "losses": ratios.losses_figure([0.5, 1.0], {"ppo": ([1, 2], [3, 4])}, 1.0, 0.9, (0.8, 1.2)),
        "dead": groups.dead_groups_figure(0.05, 8),
        "luck": groups.luck_figure([0.0, 1.0], [rng.random() for _ in range(50)]),
        "intervals": groups.intervals_figure(["a"], [0.1], [(0.0, 0.2)], "T", "gain", zero=True),
        "estimators": estimators.estimators_figure(
            estimators.sample_estimates([0.7, 0.3], [0.5, 0.5], 5, 30, 0), 0.08
        ),
        "spectrum": lora.spectrum_figure([2.0, 1.0], 1, "T"),
        "sweep": lora.sweep_figure({(8, 1e-3): 1.0, (8, 1e-2): math.nan}, (8, 1e-3)),
        "lora_run": lora.lora_run_figure(RUNS, (8, 16.0, 1e-2)),
        "agreement": scatter.agreement_figure([0, 1], {"merged": [0, 1], "base": [1, 1]}, "T"),
        "matrices": merges.matrices_figure({"W": [[1.0, -2.0]], "change": [[0.0, 0.1]]}, "T"),
        "wrong_merges": merges.wrong_merges_figure({"right": 0.0, "wrong": 30.0}, 1e-3, "T"),
        "rounding": merges.rounding_figure([0.1, 0.001], [0.0, 0.9], [0.1, 1.2], "T"),
        "timeline": servings.timeline_figure(
            {"in turn": [(0, 1, 2), (2, 2.5, 3)], "at once": [(0, 1.5, 2.5), (0, 1.6, 2.4)]}, "T"
        ),
        "shares": shares.shares_figure(
            ["a mask with a long name", "b"], {"right": [0.25, 0.0]}, "T"
        ),
        "kept": lora.kept_figure([0, 1], [0.0, 1.0], [0.0, 1.0], "T"),
        "calibration": preferences.calibration_figure([(0.55, 0.5, 4), (0.9, 0.75, 16)], "T"),
        "arms": preferences.arms_figure({"gamed": ([0.1, 1.0], [0.4, 0.3])}, "T"),
        "seeds": seeds.seeds_figure({"arm": [0.1, 0.3]}, "T", "share", level=(0.2, "chance")),
        "clinic": clinic.clinic_figure(ROWS, ROWS, "T"),
        "chat": chat.chat_figure("How much?", {"base": "no $ idea\n" * 30, "SFT": ""}),
    }


FIGURES = every_figure()


def figure_functions() -> set[str]:
    """The public functions of course_lib/plots that return a Figure; those of a run aside."""
    modules = [f"{plots.__name__}.{found.name}" for found in pkgutil.iter_modules(plots.__path__)]
    modules.remove("course_lib.plots.run")  # test_plots_run draws them
    return {
        name
        for module in map(importlib.import_module, modules)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
        if value.__annotations__.get("return") == "Figure" and name != "describe"
    }


def test_every_figure_function_is_drawn_here():
    drawn = inspect.getsource(every_figure)
    missing = [name for name in sorted(figure_functions()) if f"{name}(" not in drawn]
    assert not missing, f"add {missing} to every_figure(), with data that exercises the branches"


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_words_in_one_line_without_surprises(name):
    words = description(FIGURES[name])
    assert words, 'the function does not end with: return describe(figure, "what is drawn")'
    assert 18 < len(words) < 400
    assert "\n" not in words
    assert words.endswith(".")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_at_the_edge(name):
    """The outermost pixels of every picture are page, so no letter was cut."""
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(FIGURES[name]._repr_png_())) as picture:
        page = np.asarray(picture.convert("L"))
    for edge in (page[0], page[-1], page[:, 0], page[:, -1]):
        assert edge.min() > 250


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_that_is_drawn_is_named(name):
    unnamed = {"next_token", "stacked", "estimators", "intervals", "agreement", "seeds", "clinic"}
    for axes in FIGURES[name].axes:
        if axes.axison and name not in unnamed:
            assert axes.get_xlabel() or axes.get_ylabel()


# --- token strips


def bands(figure) -> list[tuple[float, str, str]]:
    """Left edge, colour and hatch of each filled rectangle."""
    boxes = [p for p in figure.axes[0].patches if p.get_facecolor()[3] > 0]
    return [(p.get_x(), p.get_facecolor(), p.get_hatch()) for p in boxes]


def test_exactly_the_trained_tokens_are_hatched_as_well_as_coloured():
    drawn = bands(token_strip(TOKENS, WEIGHTS))
    assert [bool(hatch) for _, _, hatch in drawn] == [bool(w) for w in WEIGHTS]
    assert len({colour for _, colour, hatch in drawn if hatch}) == 1


def test_the_words_of_a_strip_name_the_trained_tokens():
    assert "trained on: ·5 <|end|>." in description(token_strip(TOKENS, WEIGHTS))
    assert "trained on: nothing." in description(token_strip(["a"], [0.0]))


def test_a_token_strip_takes_a_learners_array_or_tensor():
    """A mask made of tensors passed its check, and then the cell that shows it stopped."""
    import torch

    plain = description(token_strip(TOKENS, WEIGHTS))
    assert description(token_strip(TOKENS, np.array(WEIGHTS))) == plain
    assert description(token_strip(TOKENS, torch.tensor(WEIGHTS))) == plain


def test_a_value_fills_its_band_in_proportion_and_signs_have_their_own_hatch():
    places = layout(TOKENS)
    figure = value_strip(TOKENS, [0.0] * 7 + [0.5, -0.25])
    filled = [p for p in figure.axes[0].patches if p.get_hatch()]
    assert [p.get_hatch() for p in filled] == ["////", "...."]
    shares = [p.get_width() / place[2] for p, place in zip(filled, places[7:], strict=True)]
    assert shares == pytest.approx([1.0, 0.5])


def test_a_long_text_breaks_into_lines_that_fit():
    places = layout([" word"] * 60)
    assert places[-1][1] > 2
    assert all(left + width <= LINE for left, _, width in places)


def test_spaces_line_breaks_and_dollars_are_shown_and_not_interpreted():
    assert [shown(t) for t in (" a", "\n", "$", "")] == ["·a", "\\n", r"\$", "∅"]


# --- the other families


def test_curves_plot_each_run_from_step_one_with_its_own_dash_and_mark():
    lines = FIGURES["curves"].axes[0].lines[:2]
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 3], [2, 2]], [[1, 4], [2, 1]]]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 2


def test_whole_steps_have_ticks_at_whole_numbers():
    """pass@k was once drawn with a tick at k = 1.5."""
    shares = {"a": [0.1, 0.2, 0.3, 0.4]}
    figure = curves.curves_figure(shares, "T", "pass@k", "k", steps=range(1, 5))
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_the_live_figure_shows_reward_dead_share_and_ratio():
    reward, dead, ratio = (axes.lines[0] for axes in FIGURES["live_rl"].axes)
    assert reward.get_ydata().tolist() == [0.25, 0.5]
    assert dead.get_ydata().tolist() == [0.75, 0.25]
    assert ratio.get_xydata().tolist() == [[1, 0]]  # the second step had no update


def test_the_live_figure_of_sft_shows_training_and_heldout_loss():
    training, heldout = FIGURES["live_sft"].axes[0].lines
    assert (training.get_ydata().tolist(), heldout.get_ydata().tolist()) == ([2.0], [2.5])


def test_a_heat_map_writes_its_numbers_into_the_cells():
    axes = FIGURES["heat"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "0.5", "0.25"]
    assert axes.images[0].get_array().tolist() == [[0.0, 1.0], [0.5, 0.25]]


def test_a_signed_heat_map_has_zero_in_the_middle_of_its_colours():
    image = FIGURES["heat_signed"].axes[0].images[0]
    assert image.get_clim() == (-2.0, 2.0)


def test_next_token_bars_are_the_probabilities():
    widths = [bar.get_width() for bar in FIGURES["next_token"].axes[0].patches]
    assert widths == [0.1, 0.9, 0.8, 0.001]
    assert "< 1%" in [text.get_text() for text in FIGURES["next_token"].axes[0].texts]


def test_stacked_parts_start_where_the_last_one_ended_and_negative_ones_go_left():
    axes = FIGURES["stacked"].axes[0]
    drawn = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert drawn == [(0.0, 1), (0.0, 0), (0.0, -0.5), (0.0, 0.25)]
    assert axes.lines[0].get_xdata().tolist() == [0.5, 0.25]


def test_the_ratio_histogram_counts_both_signs_and_says_what_the_clip_silences():
    figure = FIGURES["ratio_histogram"]
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(h for h in heights if h > 0) == 2
    assert sum(h for h in heights if h < 0) == -2
    # 1.5 upwards and 0.5 downwards; 1.5 with A < 0 is outside the range as well, and not silent
    assert "silent under PPO's clip 0.8 .. 1.2: 50%" in description(figure)


def test_a_histogram_without_a_clip_draws_no_range_and_names_none():
    figure = ratios.ratio_histogram([0.5, 1.5], [1, -1], clip=None)
    assert len(figure.axes[0].lines) == 1  # zero
    assert "clip" not in description(figure)
    assert "ratios 0.5 to 1.5" in description(figure)


def test_a_loss_whose_gradient_is_not_its_slope_is_drawn_on_the_right_only():
    curves = {"ppo": ([1, 2], [3, 4]), "mine": (None, [7, 8])}
    left, right = ratios.losses_figure([0.5, 1.0], curves, 1.0, 0.9, (0.8, 1.2)).axes
    drawn = [[line.get_label() for line in axes.lines[:4]] for axes in (left, right)]
    assert "mine" not in drawn[0]
    assert "mine" in drawn[1]


def test_ratios_far_outside_are_counted_in_the_outermost_bars():
    """Once one ratio of 0.00005 squeezed all the others into a single bar."""
    figure = ratios.ratio_histogram([5e-5, 1.0, 1.0, 400.0], [1, 1, 1, 1])
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert (heights[0], heights[39], sum(heights)) == (1, 1, 4)
    assert figure.axes[0].patches[0].get_x() == pytest.approx(0.1, rel=0.05)


def test_the_losses_figure_marks_the_nearest_ratio():
    left, right = FIGURES["losses"].axes
    assert left.lines[1].get_xydata().tolist() == [[1.0, 2]]
    assert right.lines[1].get_xydata().tolist() == [[1.0, 4]]


def test_dead_groups_follow_the_formula():
    left = FIGURES["dead"].axes[0]
    marked = left.lines[-1].get_xydata().tolist()
    assert marked == [[0.05, pytest.approx(0.663, abs=1e-3)]]
    assert groups.signal(0.5, 2) == 0.125  # of (0,1) and (1,0) half the time, A = +-1/2
    assert "66% of groups are dead" in description(FIGURES["dead"])


def test_signal_is_the_mean_squared_centred_advantage():
    rng, total, draws = random.Random(0), 0.0, 20_000
    for _ in range(draws):
        rewards = [float(rng.random() < 0.3) for _ in range(4)]
        mean = sum(rewards) / 4
        total += sum((r - mean) ** 2 for r in rewards) / 4
    assert total / draws == pytest.approx(groups.signal(0.3, 4), rel=0.02)


def test_luck_is_called_luck_exactly_when_the_interval_holds_zero():
    assert "could be luck" in description(groups.luck_figure([0.1], [-1.0, 1.0] * 50))
    assert "hardly luck" in description(groups.luck_figure([0.1], [0.5, 1.0] * 50))


def test_intervals_are_drawn_from_end_to_end():
    interval, value, zero = FIGURES["intervals"].axes[0].lines
    assert interval.get_xdata().tolist() == [0.0, 0.2]
    assert value.get_xdata().tolist() == [0.1]
    assert list(zero.get_xdata()) == [0, 0]


def test_the_exact_kl_and_the_mean_of_k1_and_k3_agree():
    policy, reference = [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]
    exact = estimators.exact_kl(policy, reference)
    assert exact == pytest.approx(0.635, abs=1e-3)
    estimates = estimators.sample_estimates(policy, reference, 100, 300, 0)
    means = {name: sum(values) / len(values) for name, values in estimates.items()}
    assert means["k1"] == pytest.approx(exact, abs=0.02)
    assert means["k3"] == pytest.approx(exact, abs=0.02)
    assert abs(means["k2"] - exact) > 0.03  # biased this far out


def test_the_spectrum_says_how_much_energy_the_rank_keeps():
    left, right = FIGURES["spectrum"].axes
    assert [bar.get_height() for bar in left.patches] == [2.0, 1.0]
    assert right.lines[0].get_ydata().tolist() == [0.8, 1.0]  # 4 of 5, then all


def test_a_run_that_blew_up_stands_at_the_top_and_says_so():
    axes = FIGURES["sweep"].axes[0]
    assert axes.lines[0].get_ydata().tolist() == [1.0, pytest.approx(1.1)]
    assert "blew up" in [text.get_text() for text in axes.texts]


def test_the_lora_explorer_shows_the_chosen_run_and_the_last_losses_of_its_neighbours():
    left, right = FIGURES["lora_run"].axes
    assert left.lines[-1].get_ydata().tolist() == [2.0, 0.5]
    assert right.lines[0].get_xydata().tolist() == [[1e-3, 1.0], [1e-2, 0.5]]


def test_agreement_names_the_largest_difference():
    words = description(FIGURES["agreement"])
    assert "merged differs by at most 0;" in words
    assert "base differs by at most 1." in words


def test_plots_never_import_torch():
    import subprocess
    import sys

    first = ["bars", "chat", "curves", "estimators", "groups", "heat"]
    modules = [*first, "lora", "ratios", "scatter", "tokens", "words"]
    imports = "; ".join(f"import course_lib.plots.{name}" for name in modules)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- lesson 09


def test_matrices_share_one_colour_scale_so_that_a_small_change_looks_small():
    images = [axes.images[0] for axes in FIGURES["matrices"].axes if axes.images]
    assert [image.get_array().tolist() for image in images] == [[[1.0, -2.0]], [[0.0, 0.1]]]
    assert {image.get_clim() for image in images} == {(-2.0, 2.0)}


def test_a_merge_beyond_the_tolerance_is_hatched_and_its_bar_ends_at_its_error():
    right, wrong = FIGURES["wrong_merges"].axes[0].patches
    assert (right.get_hatch(), wrong.get_hatch()) == ("", "//")
    assert wrong.get_x() + wrong.get_width() == pytest.approx(30.0)
    assert [t.get_text() for t in FIGURES["wrong_merges"].axes[0].texts][:2] == [
        "0.0e+00",
        "3.0e+01",
    ]


def test_a_heat_map_with_names_tells_the_means_of_the_fewer_ones():
    values, names = [[1.0, 0.0], [1.0, 0.5], [1.0, 0.4]], {"rows": "abc", "columns": ["x", "y"]}
    words = description(heat.heat_map(values, "T", "judge", "reply", "reward", **names))
    assert words.endswith("Highest: a, x. Means: x 1; y 0.3.")


def test_rounding_shows_unmoved_weights_and_the_logits_error_by_the_size_of_the_change():
    unmoved, error = FIGURES["rounding"].axes[0].lines
    assert unmoved.get_xydata().tolist() == [[0.1, 0.0], [0.001, 0.9]]
    assert error.get_ydata().tolist() == [0.1, 1.2]
    assert FIGURES["rounding"].axes[0].get_ylim()[1] > 1.2


def test_a_timeline_has_a_waiting_line_and_a_bar_for_every_call():
    in_turn = FIGURES["timeline"].axes[0]
    assert [line.get_xdata().tolist() for line in in_turn.lines] == [[0, 1], [2, 2.5]]
    assert [(bar.get_x(), bar.get_width()) for bar in in_turn.patches] == [(1, 1), (2.5, 0.5)]
    assert "at once: the last answer ends at 2.5 s." in description(FIGURES["timeline"])
