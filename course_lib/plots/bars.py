"""Bars: next-token probabilities before and after, reward components stacked, lengths counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import (
    BLUE,
    CYCLE,
    GREY,
    INK,
    VERMILLION,
    course_style,
    label,
    legend_above,
    new_figure,
    percent_axis,
    title_across,
)
from course_lib.plots.tokens import shown
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HATCHES = ("", "//", "..", "xx", "\\\\", "++")


def next_token_figure(
    tokens: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    title: str = "What comes next?",
    names: tuple[str, str] = ("before", "after"),
) -> Figure:
    """Probabilities of some next tokens under two models, side by side."""
    rows = range(len(tokens))
    with course_style():
        figure, axes = new_figure(size=(7.2, 0.42 * len(tokens) + 1.1))
        pairs = ((names[0], before, GREY, "", -0.2), (names[1], after, BLUE, "//", 0.2))
        for name, values, colour, hatch, shift in pairs:
            places = [row + shift for row in rows]
            look = {"color": colour, "hatch": hatch, "edgecolor": "white", "height": 0.36}
            axes.barh(places, list(values), label=name, **look)
            for place, value in zip(places, values, strict=True):
                _beside(axes, place, value)
        axes.set_yticks(rows, [shown(token) for token in tokens], family="DejaVu Sans Mono")
        axes.invert_yaxis()
        label(axes, title, "probability", "")
        percent_axis(axes, "x")
        axes.set_xlim(0, 1.1)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")
    best = [tokens[max(rows, key=lambda row: values[row])] for values in (before, after)]
    best = [shown(token) for token in best]
    words = f"the likeliest of these {names[0]}: {best[0]}; {names[1]}: {best[1]}."
    return describe(figure, titled(title, words))


def _beside(axes: Axes, place: float, value: float) -> None:
    text = f"{value:.0%}" if value >= 0.01 or value == 0 else "< 1%"
    axes.annotate(text, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)


FEW = 8  # bars: each is told in words


def stacked_figure(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], title: str, x: str
) -> Figure:
    """One bar for each name, made of parts; parts below zero go to the left."""
    rows = range(len(names))
    with course_style():
        figure, axes = new_figure(size=(7.2, 0.27 * len(names) + 1.2))
        above, below = [0.0] * len(names), [0.0] * len(names)
        for number, (part, values) in enumerate(parts.items()):
            starts = [a if v >= 0 else b for v, a, b in zip(values, above, below, strict=True)]
            look = {"color": CYCLE[number], "hatch": HATCHES[number], "edgecolor": "white"}
            axes.barh(rows, list(values), left=starts, label=part, **look)
            above = [a + max(v, 0) for v, a in zip(values, above, strict=True)]
            below = [b + min(v, 0) for v, b in zip(values, below, strict=True)]
        totals = [a + b for a, b in zip(above, below, strict=True)]
        if len(parts) > 1:
            look = {"marker": "D", "linestyle": "", "color": INK, "clip_on": False}
            axes.plot(totals, list(rows), label="sum", **look)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(rows, [_short(name) for name in names], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        label(axes, "", x, "")
        legend_above(axes)
        title_across(figure, title)
    made = ", ".join(parts)
    if len(names) <= FEW:
        told = "; ".join(
            f"{_short(name)} {total:.3g}" for name, total in zip(names, totals, strict=True)
        )
    else:
        told = f"Highest: {_short(names[max(rows, key=lambda row: totals[row])])}"
    return describe(figure, titled(title, f"bars made of {made}. {told}."))


def _short(text: str, most: int = 44) -> str:
    text = " ".join(text.split()) or "(empty)"
    return (text if len(text) <= most else text[: most - 3] + "...").replace("$", r"\$")


def counts_figure(
    values: Sequence[float],
    title: str,
    x: str,
    bins: int = 24,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """How often each value occurs; `marks` are vertical lines with names."""
    with course_style():
        figure, axes = new_figure()
        axes.hist(list(values), bins=bins, color=BLUE, edgecolor="white", hatch="//")
        for number, (name, place) in enumerate((marks or {}).items()):
            colour = (VERMILLION, INK)[number % 2]
            style = ("--", ":")[number % 2]
            axes.axvline(place, color=colour, linestyle=style, label=f"{name}: {place:.3g}")
        label(axes, title, x, "count")
        if marks:
            axes.legend()
    words = f"{len(values)} values between {min(values):.3g} and {max(values):.3g}"
    return describe(figure, titled(title, f"{words}."))
