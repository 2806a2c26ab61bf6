"""Merging: a weight and its change as pictures, wrong merges side by side, what rounding leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import (
    BLUE,
    INK,
    VERMILLION,
    course_style,
    label,
    new_figure,
    percent_axis,
)
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Matrix = Sequence[Sequence[float]]
FLOOR = 1e-6  # logits; where a difference of nothing is drawn on a log axis


def matrices_figure(matrices: Mapping[str, Matrix], title: str) -> Figure:
    """Matrices side by side in one colour scale, so that small ones look small."""
    largest = {
        name: max(abs(float(value)) for row in matrix for value in row)
        for name, matrix in matrices.items()
    }
    bound = max(largest.values()) or 1.0
    with course_style():
        figure, places = new_figure(1, len(matrices), size=(7.2, 2.4), squeeze=False)
        for axes, (name, matrix) in zip(places[0], matrices.items(), strict=True):
            rows = [[float(value) for value in row] for row in matrix]
            image = axes.imshow(rows, cmap="RdBu", vmin=-bound, vmax=bound, interpolation="nearest")
            label(axes, name, "input", "output")
            axes.grid(visible=False)
            axes.label_outer()
        figure.colorbar(image, ax=places[0].tolist(), label="value", pad=0.02, shrink=0.7)
    words = "; ".join(f"{name} up to {value:.2g}" for name, value in largest.items())
    return describe(figure, f"{title}, in one colour scale: {words}.")


def wrong_merges_figure(errors: Mapping[str, float], tolerance: float, title: str) -> Figure:
    """The largest logit error of each merge as a bar on a log axis; the tolerance is a line."""
    names, rows = list(errors), range(len(errors))
    with course_style():
        figure, axes = new_figure(size=(7.2, 0.36 * len(names) + 1.2))
        for row, error in zip(rows, errors.values(), strict=True):
            good = error <= tolerance
            look = {"color": BLUE if good else VERMILLION, "hatch": "" if good else "//"}
            axes.barh(row, max(error, FLOOR) - FLOOR, left=FLOOR, edgecolor="white", **look)
            axes.annotate(
                f"{error:.1e}", (max(error, FLOOR), row), (4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
        axes.axvline(tolerance, color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            "tolerance", (tolerance, -0.75), (3, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(FLOOR, max(*errors.values(), tolerance) * 12)
        axes.set_ylim(len(names) - 0.4, -1.1)
        axes.set_yticks(list(rows), names)
        axes.grid(visible=False, axis="y")
        label(axes, title, "largest difference of a logit from the adapter's (log)", "")
    words = "; ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return describe(figure, f"{title}, tolerance {tolerance:.0e}: {words}.")


def rounding_figure(
    sizes: Sequence[float], unmoved: Sequence[float], error: Sequence[float], title: str
) -> Figure:
    """By the size of a change (median share of the weight): what rounding leaves of it.

    `unmoved` is the share of weights that stay as they were, `error` how far the logits are off, as
    a share of what the change does to them.
    """
    with course_style():
        figure, axes = new_figure()
        look = {"color": VERMILLION, "linestyle": "--", "marker": "s"}
        axes.plot(list(sizes), list(unmoved), label="weights that do not move at all", **look)
        look = {"color": BLUE, "linestyle": "-", "marker": "o"}
        axes.plot(list(sizes), list(error), label="effect on the logits that is lost", **look)
        axes.set_xscale("log")
        label(axes, title, "change / weight (median, log)", "share")
        percent_axis(axes)
        axes.set_ylim(-0.03, max(1.05, 1.05 * max(error)))
        axes.legend(loc="upper right")
    still, lost = (f"{each[0]:.0%} to {each[-1]:.0%}" for each in (unmoved, error))
    words = f"a change of {sizes[0]:.1g} to {sizes[-1]:.1g} of the weight: {still} of the weights"
    return describe(figure, titled(title, f"{words} unmoved, {lost} of the effect lost."))
