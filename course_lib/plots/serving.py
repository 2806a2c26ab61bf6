"""Serving: when did each caller ask, see the first token, and see the last one?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import CYCLE, INK, course_style, label, new_figure, title_across
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Call = tuple[float, float, float]  # asked, first token, last token (s)


def timeline_figure(scenarios: Mapping[str, Sequence[Call]], title: str) -> Figure:
    """A row for each call: a thin line while it waits, a bar from its first to its last token."""
    from matplotlib.ticker import MaxNLocator

    with course_style():
        figure, places = new_figure(
            1, len(scenarios), size=(7.2, 3.2), squeeze=False, sharex=True, sharey=True
        )
        for number, (axes, (name, calls)) in enumerate(
            zip(places[0], scenarios.items(), strict=True)
        ):
            hatch = ("", "//", "..")[number % 3]
            for row, (asked, first, last) in enumerate(calls, start=1):
                axes.plot([asked, first], [row, row], color=INK, linewidth=1, marker="", ls=":")
                look = {"color": CYCLE[number], "edgecolor": "white", "hatch": hatch}
                axes.barh(row, last - first, left=first, height=0.8, **look)
            label(axes, name, "time (s)", "" if number else "call")
            axes.set_xlim(left=0)
        places[0][0].set_ylim(max(map(len, scenarios.values())) + 0.8, 0.2)
        places[0][0].yaxis.set_major_locator(MaxNLocator(integer=True))
        title_across(figure, title)
    ends = "; ".join(
        f"{name}: the last answer ends at {max(last for _, _, last in calls):.2g} s"
        for name, calls in scenarios.items()
    )
    lines = "dotted: waiting; bar: from the first token to the last"
    return describe(figure, titled(title, f"{lines}. {ends}."))
