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


FAR = 0.25  # of all that a list reaches: so far beyond its ends is worth telling


def span(values: list[float]) -> str:
    """From where to where a list goes, in words: "from 5.1 to 0.32"; and how far between, if that
    is clearly beyond both: ", highest 0.84".

    What cannot be told from zero in the drawing, a ten-thousandth of the list's reach, is called 0.
    """
    if not values:
        return "without values"
    least = 1e-4 * max(abs(value) for value in values)
    first, last = (0.0 if abs(each) < least else each for each in (values[0], values[-1]))
    lowest, highest = min(values), max(values)
    beyond = FAR * (highest - lowest)
    words = f"from {first:.3g} to {last:.3g}"
    if highest - max(first, last) > beyond:
        words += f", highest {highest:.3g}"
    if min(first, last) - lowest > beyond:
        words += f", lowest {lowest:.3g}"
    return words
