"""Judges and rewards against the truth: calibration, and a reward's arms beside true quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import (
    BLUE,
    CYCLE,
    DASHES,
    INK,
    MARKERS,
    course_style,
    label,
    legend_above,
    new_figure,
    percent_axis,
    step_axis,
    title_across,
)
from course_lib.plots.words import describe, span, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def calibration_figure(bins: Sequence[tuple[float, float, int]], title: str) -> Figure:
    """Bins of (mean confidence, share right, count), against the diagonal of an honest judge."""
    confidences, rights, counts = ([row[i] for row in bins] for i in range(3))
    with course_style():
        figure, axes = new_figure(size=(5.2, 4.0))
        honest = {"color": INK, "linestyle": ":", "marker": "", "linewidth": 1.2}
        axes.plot([0.5, 1], [0.5, 1], label="says what it knows", **honest)
        axes.plot([], [], color=BLUE, marker="o", linestyle="", label="this judge")
        for confidence, right, count in bins:
            size = 4 + count**0.5  # points, so that the area grows with the count
            axes.plot([confidence], [right], color=BLUE, marker="o", markersize=size, alpha=0.8)
            beside = {"textcoords": "offset points", "fontsize": 8, "ha": "center"}
            beside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.annotate(str(count), (confidence, right), (0, size / 2 + 3), **beside)
        label(
            axes, title, "confidence (probability of its choice)", "share right (of so many pairs)"
        )
        percent_axis(axes)
        percent_axis(axes, "x")
        axes.set(xlim=(0.46, 1.04), xticks=(0.5, 0.75, 1.0), ylim=(-0.03, 1.12))
        axes.legend(loc="lower right")
    words = "; ".join(
        f"{confidence:.0%} sure, {right:.0%} right ({count})"
        for confidence, right, count in zip(confidences, rights, counts, strict=True)
    )
    return describe(figure, titled(title, f"{words}."))


def arms_figure(
    arms: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    names: tuple[str, str] = ("reward", "true quality"),
) -> Figure:
    """One panel for each arm of an experiment: what was paid and what was wanted, step by step."""
    with course_style():
        figure, places = new_figure(1, len(arms), size=(7.2, 3.2), sharey=True, squeeze=False)
        for axes, (arm, curves) in zip(places[0], arms.items(), strict=True):
            for name, values, number in zip(names, curves, (1, 0), strict=True):
                look = {"color": CYCLE[number], "linestyle": DASHES[number]}
                steps = range(1, len(values) + 1)
                every = max(1, len(values) // 8)
                axes.plot(steps, list(values), label=name, marker=MARKERS[number], **look)
                axes.lines[-1].set_markevery(every)
            label(axes, "", "step", "mean of the step's answers" if axes is places[0][0] else "")
            axes.set_title(arm, pad=24, fontweight="normal")
            step_axis(axes)
            legend_above(axes)
        places[0][0].set_ylim(bottom=0)  # shared, so only when every curve is drawn
        title_across(figure, title)
    words = "; ".join(
        f"{arm}: " + ", ".join(f"{n} {span(list(v))}" for n, v in zip(names, curves, strict=True))
        for arm, curves in arms.items()
    )
    return describe(figure, titled(title, f"{words}."))
