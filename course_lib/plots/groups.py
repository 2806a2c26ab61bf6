"""Groups: how many are dead, how much signal the rest holds; gains with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from course_lib.advantages import dead_group_probability
from course_lib.plots.style import (
    BLUE,
    CYCLE,
    DASHES,
    INK,
    SKY,
    VERMILLION,
    course_style,
    label,
    legend_above,
    new_figure,
    percent_axis,
)
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def signal(p: float, group_size: int) -> float:
    """Mean squared centred advantage: p (1 - p) (G - 1) / G."""
    return p * (1 - p) * (group_size - 1) / group_size


def dead_groups_figure(p: float, group_size: int) -> Figure:
    """Dead groups and signal by the chance p of a right answer; this p and G marked."""
    grid = [i / 100 for i in range(101)]
    with course_style():
        figure, (left, right) = new_figure(1, 2, size=(7.2, 3.2))
        for number, size in enumerate(sorted({2, 4, 8, 16} | {group_size})):
            style = {"color": CYCLE[number % 6], "linestyle": DASHES[number % 6], "marker": ""}
            width = 2.8 if size == group_size else 1.2
            shares = [dead_group_probability(x, size) for x in grid]
            left.plot(grid, shares, label=f"G = {size}", linewidth=width, **style)
        left.plot([p], [dead_group_probability(p, group_size)], marker="o", color=INK, markersize=9)
        label(left, "Dead groups", "chance of a right answer, p", "share of groups")
        percent_axis(left)
        left.legend(loc="upper center", fontsize=8)
        energies = [signal(x, group_size) for x in grid]
        right.plot(grid, energies, color=BLUE, linestyle="-", marker="")
        right.plot([p], [signal(p, group_size)], marker="o", color=INK, markersize=9)
        label(right, f"Signal at G = {group_size}", "chance of a right answer, p", "mean A²")
        right.set_ylim(0, 0.27)
    share = dead_group_probability(p, group_size)
    words = f"p = {p:.2f} and G = {group_size}: {share:.0%} of groups are dead"
    return describe(figure, f"At {words}; the signal is {signal(p, group_size):.3f}.")


def luck_figure(gains: Sequence[float], resampled: Sequence[float], level: float = 0.95) -> Figure:
    """Mean gains of resampled problem sets, with the interval, and zero."""
    import numpy as np

    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean(gains))
    verdict = "could be luck" if low <= 0 <= high else "is hardly luck"
    with course_style():
        figure, axes = new_figure()
        axes.hist(list(resampled), bins=30, color=BLUE, hatch="//", edgecolor="white")
        axes.axvspan(low, high, color=SKY, alpha=0.25, label=f"{level:.0%} interval")
        axes.axvline(mean, color=INK, label=f"measured: {100 * mean:+.1f} points")
        axes.axvline(0, color=VERMILLION, linestyle="--", label="no difference")  # seen on top
        label(axes, f"This gain {verdict}", "mean gain (share of problems)", "resamples")
        axes.set_title(axes.get_title(loc="left"), pad=26)
        legend_above(axes)
    words = f"gain {100 * mean:+.1f} points, interval {100 * low:+.1f} to {100 * high:+.1f}"
    return describe(figure, f"{len(gains)} problems: {words}: {verdict}.")


def intervals_figure(
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    title: str,
    x: str,
    zero: bool = False,
) -> Figure:
    """Values with their intervals, one below the other; `zero` draws the line of no difference."""
    rows = range(len(names))
    with course_style():
        figure, axes = new_figure(size=(7.2, 0.45 * len(names) + 1.2))
        for row, value, (low, high) in zip(rows, values, intervals, strict=True):
            axes.plot([low, high], [row, row], color=BLUE, linestyle="-", marker="|", markersize=9)
            axes.plot([value], [row], color=INK, marker="D", linestyle="")
        if zero:
            axes.axvline(0, color=VERMILLION, linestyle="--", linewidth=1.2)
        axes.set_yticks(rows, list(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        label(axes, title, x, "")
    words = "; ".join(
        f"{name} {value:.3g} ({low:.3g} to {high:.3g})"
        for name, value, (low, high) in zip(names, values, intervals, strict=True)
    )
    return describe(figure, titled(title, f"{words}."))
