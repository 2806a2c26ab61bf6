"""Scatter: are two models the same? Logits against logits, on the diagonal or beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import CYCLE, INK, MARKERS, course_style, label, new_figure
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def agreement_figure(
    reference: Sequence[float],
    others: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Each model's logits over the adapter's (`reference`); the same model is on the diagonal."""
    every = [*reference, *(value for values in others.values() for value in values)]
    with course_style():
        figure, axes = new_figure(size=(5.2, 4.2))
        axes.plot(
            [min(every), max(every)], [min(every), max(every)], color=INK, linewidth=1, marker=""
        )
        for number, (name, values) in enumerate(others.items()):
            style = {"color": CYCLE[number], "marker": MARKERS[number], "alpha": 0.7}
            axes.plot(list(reference), list(values), linestyle="", label=name, **style)
        label(axes, title, "logit of the adapter", "logit")
        axes.legend()
    apart = {
        name: max(abs(x - y) for x, y in zip(reference, values, strict=True))
        for name, values in others.items()
    }
    words = "; ".join(f"{name} differs by at most {gap:.2g}" for name, gap in apart.items())
    return describe(figure, titled(title, f"{words}."))
