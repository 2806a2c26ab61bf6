"""One dot per seed and arm: what five seeds say, without hiding one of them behind a mean."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import (
    CYCLE,
    INK,
    MARKERS,
    course_style,
    label,
    new_figure,
    title_across,
)
from course_lib.plots.words import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def seeds_figure(
    arms: Mapping[str, Sequence[float]],
    title: str,
    unit: str,
    *,
    level: tuple[float, str] | None = None,
) -> Figure:
    """Rows of dots, one row per arm; a bar marks the median, a dotted line the `level`."""
    with course_style():
        figure, axes = new_figure(size=(7.2, 0.42 * len(arms) + 1.3))
        for row, (_, values) in enumerate(arms.items()):
            spread = [row + 0.09 * (place - (len(values) - 1) / 2) for place in range(len(values))]
            look = {"marker": MARKERS[row % len(MARKERS)], "color": CYCLE[row % len(CYCLE)]}
            axes.scatter(list(values), spread, s=34, **look)
            middle = statistics.median(values)
            bar = {"color": INK, "linewidth": 2, "linestyle": "-", "marker": ""}
            axes.plot([middle, middle], [row - 0.36, row + 0.36], **bar)
        if level is not None:
            axes.axvline(level[0], color=INK, linestyle=":", linewidth=1.4)
            place = {"textcoords": "offset points", "fontsize": 8}
            axes.annotate(level[1], (level[0], -0.7), (4, 0), **place)
        axes.set_yticks(range(len(arms)), list(arms))
        axes.set_ylim(len(arms) - 0.45, -0.8)
        axes.grid(axis="y", visible=False)
        label(axes, "", unit, "")
        # Long names leave the axes little width; the title has that of the whole figure.
        title_across(figure, title)
    words = "; ".join(
        f"{name} {statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
        for name, values in arms.items()
    )
    return describe(figure, f"{title}, {unit}: median (least to most) of the seeds. {words}.")
