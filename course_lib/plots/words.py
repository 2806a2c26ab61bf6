"""Every figure carries its description: what is drawn, for readers who cannot see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def describe(figure: Figure, text: str) -> Figure:
    """Attach a description to a figure and hand the figure back."""
    figure.set_label(text)
    return figure


def titled(title: str, words: str) -> str:
    """A description that begins with the title: "Loss: from 2 to 1", "Who pays? Heat map ..."."""
    return f"{title} {words}" if title.endswith(("?", "!", ".", ":")) else f"{title}: {words}"


def description(figure: Figure) -> str:
    """The description of a figure; empty if it has none."""
    return str(figure.get_label())


def span(values: list[float]) -> str:
    """From where to where a list goes, in words: "from 5.1 to 0.32"."""
    return f"from {values[0]:.3g} to {values[-1]:.3g}" if values else "without values"
