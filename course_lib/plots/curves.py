"""Curves over steps: losses, rewards, lengths; runs are told apart by dash and mark as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_lib.plots.style import (
    BLUE,
    CYCLE,
    DASHES,
    INK,
    MARKERS,
    VERMILLION,
    course_style,
    label,
    legend_above,
    new_figure,
    step_axis,
    whole_axis,
)
from course_lib.plots.words import describe, span, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curves_figure(
    runs: Mapping[str, Sequence[float]],
    title: str,
    y: str,
    x: str = "step",
    *,
    level: tuple[float, str] | None = None,
    steps: Sequence[float] | None = None,
    first: int = 1,
    looks: Mapping[str, int] | None = None,
) -> Figure:
    """One line per run; `level` is a dotted line with its name (ln V, chance, a target).

    `looks`: which number's colour, dash and mark a run has, so that it keeps those of another
    figure; by default its place among the runs.
    """
    with course_style():
        figure, axes = new_figure()
        for number, (name, values) in enumerate(runs.items()):
            look = number if looks is None else looks[name]
            _line(axes, look, name, steps or range(first, first + len(values)), values)
        if level is not None:
            _level(axes, *level)
        label(axes, title, x, y)
        if steps is None:
            step_axis(axes)
        elif all(isinstance(step, int) for step in steps):
            whole_axis(axes)  # there is no pass@1.5
        if len(runs) > 1:
            axes.legend(loc="best")
    words = "; ".join(f"{name} {span(list(values))}" for name, values in runs.items())
    return describe(figure, titled(title, f"{y} by {x}. {words}."))


def _line(axes: Axes, number: int, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    few = max(1, len(y) // 12)
    axes.plot(
        list(x),
        list(y),
        label=name,
        color=CYCLE[number % len(CYCLE)],
        linestyle=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markevery=few,
    )


def _level(axes: Axes, value: float, name: str) -> None:
    axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
        name,
        (1, value),
        xytext=(-4, 5),  # above the marks of a line that runs along the level
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )


def two_curves_figure(
    left: Sequence[float],
    right: Sequence[float],
    names: tuple[str, str],
    title: str,
    x: str = "step",
) -> Figure:
    """Two quantities with different units, one above the other, over the same steps."""
    with course_style():
        figure, axes = new_figure(2, 1, size=(7.2, 4.4), sharex=True)
        for place, values, name, number in zip(axes, (left, right), names, (0, 3), strict=True):
            _line(place, number, name, range(1, len(values) + 1), values)
            label(place, "", "", name)
        axes[0].set_title(title)
        axes[1].set_xlabel(x)
        step_axis(axes[1])
    words = f"{names[0]} {span(list(left))}; {names[1]} {span(list(right))}"
    return describe(figure, titled(title, f"{words}."))


def live_figure(rows: Sequence[Mapping[str, Any]], total: int) -> Figure:
    """The live dashboard's picture: loss or reward, dead groups, ratio, so far."""
    reinforcement = any("reward/total" in row for row in rows)
    main = ("reward/total", "reward (mean)") if reinforcement else ("train/nll", "loss (nats)")
    steps = [row["step"] for row in rows]
    with course_style():
        figure, axes = new_figure(1, 3 if reinforcement else 1, size=(7.2, 2.6))
        places = list(axes) if reinforcement else [axes]
        _live_panel(places[0], steps, [row.get(main[0]) for row in rows], main[1], BLUE, total)
        if reinforcement:
            dead = [row["env/dead_groups"] / max(1, row["env/groups"]) for row in rows]
            _live_panel(places[1], steps, dead, "dead groups (share)", VERMILLION, total)
            places[1].set_ylim(-0.03, 1.03)
            name = "ratio/max_deviation"
            ratio = [row.get(f"{name}_late", row.get(name)) for row in rows]
            _live_panel(places[2], steps, ratio, "largest |ratio - 1|", CYCLE[2], total)
        else:
            heldout = [(row["step"], row["test/nll"]) for row in rows if "test/nll" in row]
            if heldout:
                where, values = zip(*heldout, strict=True)
                style = {"color": VERMILLION, "marker": "s", "linestyle": "--"}
                places[0].plot(where, values, label="held out", **style)
                legend_above(places[0])
    curves = {main[1]: [row.get(main[0]) for row in rows]}
    if reinforcement:
        curves |= {"dead groups (share)": dead, "largest |ratio - 1|": ratio}
    elif heldout:
        curves["held out"] = list(values)
    told = [f"{name} {span([v for v in vs if v is not None])}" for name, vs in curves.items()]
    done = f"{len(rows)} of {total} steps"
    return describe(figure, f"Training so far, {done}: {'; '.join(told)}.")


def _live_panel(
    axes: Axes, steps: list[int], values: Sequence[float | None], name: str, colour: str, total: int
) -> None:
    pairs = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    x, y = ([], []) if not pairs else zip(*pairs, strict=True)
    axes.plot(x, y, color=colour, linestyle="-", marker="o", markersize=3, label="training")
    label(axes, "", "step", name)
    axes.set_xlim(0, max(total, 1) * 1.02)
    axes.set_ylim(bottom=min(0, *y) if y else 0, top=None if y else 1)
    if not y:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "waiting", transform=axes.transAxes, ha="center", color=INK)
