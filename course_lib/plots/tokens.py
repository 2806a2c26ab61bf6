"""Token strips: a text cut into its tokens, each with a band that tells what training does with it.

The band is coloured and hatched, so that it can be read in grey. Nothing is printed over the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import BLUE, INK, VERMILLION, course_style, new_figure
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = 66  # characters in a line
GAP = 0.35  # characters between two boxes
BOX, BAND = 0.62, 0.3  # heights, in lines
IDLE = "#E6E6E6"


def token_strip(tokens: Sequence[str], weights: Sequence[float], title: str = "") -> Figure:
    """Tokens with their weights: a hatched blue band is trained on, a grey one only read."""
    places = layout(tokens)
    trained = [token for token, weight in zip(tokens, weights, strict=True) if weight > 0]
    with course_style():
        figure, axes = _canvas(places, title)
        for place, token, weight in zip(places, tokens, weights, strict=True):
            _box(axes, place, token)
            look = {"color": BLUE, "hatch": "////", "alpha": float(weight)} if weight > 0 else {}
            _band(axes, place, 1.0, **look)
        _legend(axes, [("trained on", BLUE, "////"), ("read only", IDLE, "")])
    words = f"{len(tokens)} tokens; {len(trained)} trained on: {_listed(trained)}."
    return describe(figure, titled(title or "Token strip", words))


def value_strip(
    tokens: Sequence[str],
    values: Sequence[float],
    title: str = "",
    names: tuple[str, str] = ("pushed up", "pushed down"),
) -> Figure:
    """Tokens with signed values (advantages, log ratios): up is blue, down is red and hatched."""
    places = layout(tokens)
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    with course_style():
        figure, axes = _canvas(places, title)
        for place, token, value in zip(places, tokens, values, strict=True):
            _box(axes, place, token)
            _band(axes, place, 1.0)
            if value:
                colour, hatch = (BLUE, "////") if value > 0 else (VERMILLION, "....")
                _band(axes, place, abs(value) / largest, color=colour, hatch=hatch)
        _legend(axes, [(names[0], BLUE, "////"), (names[1], VERMILLION, "...."), ("0", IDLE, "")])
    up, down = (sum(sign * value > 0 for value in values) for sign in (1, -1))
    words = f"{len(tokens)} tokens, {up} {names[0]}, {down} {names[1]}; largest {largest:.3g}."
    return describe(figure, titled(title or "Token strip", words))


def layout(tokens: Sequence[str]) -> list[tuple[float, int, float]]:
    """Where each token's box stands: (left edge in characters, line, width in characters)."""
    places, left, line = [], 0.0, 0
    for token in tokens:
        width = len(shown(token)) + 0.7
        if left and left + width > LINE:
            left, line = 0.0, line + 1
        places.append((left, line, width))
        left += width + GAP
    return places


def shown(token: str) -> str:
    """A token with its spaces and line breaks made visible.

    >>> shown(" 129")
    '·129'
    """
    return token.replace(" ", "·").replace("\n", "\\n").replace("$", r"\$") or "∅"


def _canvas(places: Sequence[tuple[float, int, float]], title: str) -> tuple[Figure, Axes]:
    lines = places[-1][1] + 1 if places else 1
    figure, axes = new_figure(size=(7.2, 0.42 * lines + 0.55 + (0.3 if title else 0)))
    axes.set_xlim(-0.3, LINE + 0.8)
    axes.set_ylim(lines - 0.02, -0.12)  # the first line on top
    axes.set_axis_off()
    axes.set_title(title)
    return figure, axes


def _box(axes: Axes, place: tuple[float, int, float], token: str) -> None:
    left, line, width = place
    axes.text(
        left + width / 2,
        line + BOX / 2 + 0.02,
        shown(token),
        family="DejaVu Sans Mono",
        fontsize=8.6,
        ha="center",
        va="center",
    )
    _rectangle(axes, left, line, width, BOX + BAND, facecolor="none", edgecolor="#8A8A8A")


def _band(
    axes: Axes,
    place: tuple[float, int, float],
    share: float,
    color: str = IDLE,
    hatch: str = "",
    alpha: float = 1.0,
) -> None:
    """The band below a token's text; `share` of its width is filled."""
    left, line, width = place
    look = {"facecolor": color, "edgecolor": "white", "hatch": hatch, "alpha": max(alpha, 0.25)}
    _rectangle(axes, left, line + BOX, width * share, BAND, **look)


def _rectangle(axes: Axes, left: float, top: float, width: float, height: float, **look) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, height, linewidth=0.7, **look))


def _legend(axes: Axes, entries: list[tuple[str, str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name)
        for name, colour, hatch in entries
    ]
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, 0.02),
        ncols=len(handles),
        borderaxespad=0.2,
        fontsize=9,
        labelcolor=INK,
    )


def _listed(tokens: Sequence[str], most: int = 12) -> str:
    """The first tokens and, where some are left out, the last: it tells whether the end counts."""
    words = [shown(token) for token in tokens]
    if len(words) > most:
        words = [*words[: most - 1], "...", words[-1]]
    return " ".join(words) or "nothing"
