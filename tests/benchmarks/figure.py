"""The figure of the bench: how many times as fast as its peer each row is, and growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rows import DUELS


def draw(results: dict[str, Any], path: Path) -> None:
    from course_lib.plots.style import course_style, save_figure

    with course_style():
        figure, words = compose(results)
        save_figure(figure, path, words)


def compose(results: dict[str, Any]) -> tuple[Any, str]:
    """Bars of ratios with the spread of their rounds and a mark at the target; step time."""
    from report import limits, median, ratios, wanted

    from course_lib.plots.style import BLUE, GREY, INK, VERMILLION, label, new_figure

    about, rows = limits(results), results["rows"]
    bars = [
        (f"{row.title.split(' calls')[0]} ({row.model})\nbeside {target.peer}", row, target)
        for name, row in DUELS.items()
        if name in rows
        for target in row.targets
    ]
    names = {id(row): name for name, row in DUELS.items()}
    growth = rows.get("growth")
    figure, axes = new_figure(
        2 if growth else 1,
        size=(7.2, 0.5 * len(bars) + 1.2 + (2.6 if growth else 0)),
        height_ratios=[0.5 * len(bars) + 1, 2.6] if growth else None,
    )
    above = axes[0] if growth else axes
    words = []
    for place, (text, row, target) in enumerate(bars):
        found = rows[names[id(row)]]
        each = ratios(found, target.peer)
        middle, aim = median(each), wanted(row, found, target, about)
        above.barh(place, middle, color=BLUE if middle >= aim else GREY, height=0.6)
        above.plot([min(each), max(each)], [place, place], color=INK, marker="|", linestyle="-")
        above.plot([aim, aim], [place - 0.4, place + 0.4], color=VERMILLION, marker="", ls="--")
        right = (max([*each, aim]), place)  # of bar and target: it crosses neither
        above.annotate(f"{middle:.1f}x", right, (5, 0), textcoords="offset points", va="center")
        words.append(f"{text.replace(chr(10), ' ')}: {middle:.2f}")
    above.set_yticks(range(len(bars)), [text for text, _, _ in bars], fontsize=7)
    above.invert_yaxis()
    above.axvline(1, color=INK, linewidth=0.8)
    above.grid(axis="y", visible=False)
    above.set_xscale("log")
    ticks = [1, 2, 3, 5, 10, 20, 50]
    above.set_xticks(ticks, [str(tick) for tick in ticks])
    above.minorticks_off()
    label(above, "How many times as fast?", "peer's time / ours; dashes: target", "")
    if growth:
        for key, text in (("by_length", "8 rows, longer"), ("by_count", "more rows of 128")):
            points = [(count * length, seconds) for count, length, seconds in growth[key]]
            axes[1].plot([x for x, _ in points], [1e3 * y for _, y in points], label=text)
        label(axes[1], "A step of the 0.9 M model", "tokens of a step", "ms")
        axes[1].set_xlim(left=0)
        axes[1].set_ylim(bottom=0)
        axes[1].legend()
    return figure, "The peer's time divided by ours. " + "; ".join(words)
