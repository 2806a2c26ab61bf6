"""Shares side by side: several things, each measured by the same few shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.bars import HATCHES
from course_lib.plots.style import (
    CYCLE,
    course_style,
    label,
    legend_above,
    new_figure,
    percent_axis,
    title_across,
)
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def shares_figure(
    names: Sequence[str], shares: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """One group of bars for each name; `shares` has one list (0 to 1, by name) for each measure."""
    height = 0.8 / len(shares)
    with course_style():
        figure, axes = new_figure(size=(7.2, 0.24 * len(names) * (len(shares) + 0.6) + 1.3))
        for number, (measure, values) in enumerate(shares.items()):
            places = [row - 0.4 + height * (number + 0.5) for row in range(len(names))]
            look = {"color": CYCLE[number], "hatch": HATCHES[number], "edgecolor": "white"}
            axes.barh(places, list(values), height=0.9 * height, label=measure, **look)
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    f"{value:.0%}",
                    (value, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        axes.set_yticks(range(len(names)), list(names))
        axes.invert_yaxis()
        label(axes, "", "share", "")
        percent_axis(axes, "x")
        axes.set_xlim(0, 1.1)
        axes.grid(axis="y", visible=False)
        legend_above(axes)
        title_across(figure, title)
    rows = (
        f"{name}: "
        + ", ".join(f"{measure} {values[row]:.0%}" for measure, values in shares.items())
        for row, name in enumerate(names)
    )
    return describe(figure, titled(title, f"{'; '.join(rows)}."))
