"""One RL run on one sheet: eight curves that together tell what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_lib.plots.style import (
    BLUE,
    GREY,
    INK,
    course_style,
    new_figure,
    step_axis,
    title_across,
)
from course_lib.plots.words import describe, span, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
FLOOR = 1e-6  # of the ratio's logarithmic axis: float32 rounding lies about here

SHARES = ("env/correct", "dead", "env/stop_share")

# metric, name on the axis, log axis
PANELS = (
    ("reward/total", "reward (mean)", False),
    ("env/correct", "right answers (share)", False),
    ("dead", "dead groups (share)", False),
    ("ratio/max_deviation", "largest |ratio - 1|", True),
    ("kl/reference", "KL (nats/answer)", False),
    ("optim/entropy", "entropy (nats/token)", False),
    ("env/completion_tokens", "length (tokens)", False),
    ("env/stop_share", "answers that end (share)", False),
)


def clinic_figure(rows: Rows, healthy: Rows, title: str) -> Figure:
    """A run's eight curves, each over those of a healthy run (dashed, grey)."""
    with course_style():
        figure, axes = new_figure(2, 4, size=(9.0, 4.2), sharex=True)
        title_across(figure, title)
        for number, (place, panel) in enumerate(zip(axes.flat, PANELS, strict=True)):
            _panel(place, rows, healthy, panel)
            if number >= 4:
                place.set_xlabel("step")
                step_axis(place)
        handles, names = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower right", ncols=2, fontsize=9)
    told = [f"{name} {span(curve(rows, metric)[1])}" for metric, name, _ in PANELS]
    return describe(figure, titled(title, "; ".join(told) + "."))


def curve(rows: Rows, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one panel's curve; steps without the metric are passed over."""
    found = []
    for row in rows:
        value = row.get(metric)
        if metric == "dead":
            value = row["env/dead_groups"] / row["env/groups"]
        if value is not None:
            found.append((row["step"], float(value)))
    return [step for step, _ in found], [value for _, value in found]


def _panel(axes: Axes, rows: Rows, healthy: Rows, panel: tuple[str, str, bool]) -> None:
    metric, name, log = panel
    looks: tuple[tuple[Rows, dict[str, Any]], ...] = (
        (healthy, {"color": GREY, "linestyle": "--", "marker": "", "label": "a healthy run"}),
        (rows, {"color": BLUE, "linestyle": "-", "marker": "", "label": "this run"}),
    )
    for source, look in looks:
        steps, values = curve(source, metric)
        axes.plot(steps, [max(value, FLOOR) for value in values] if log else values, **look)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(FLOOR / 2, 200)
    if metric in SHARES:
        axes.set_ylim(-0.04, 1.04)
    if not curve(rows, metric)[0]:
        words = "no data: no step was taken"
        axes.text(0.5, 0.5, words, fontsize=8, ha="center", transform=axes.transAxes, color=INK)
    axes.set_title(name, fontsize=9, fontweight="normal", pad=4)
    axes.tick_params(labelsize=8)
