"""Heat maps: a small matrix with its numbers in the cells, so that colour is never needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import INK, course_style, label, new_figure
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Matrix = Sequence[Sequence[float]]
MOST_NUMBERS = 160  # cells; with more of them the numbers could not be read
MOST_MEANS = 8  # that the description tells


def heat_map(
    matrix: Matrix,
    title: str,
    x: str,
    y: str,
    unit: str,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    signed: bool = False,
    digits: int = 2,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A matrix as colours and numbers; `signed` puts 0 in the middle (blue above, red below).

    `limits` are the ends of the colours, so that two maps can be compared; by default those of the
    values.
    """
    values = [[float(value) for value in row] for row in matrix]
    flat = [value for row in values for value in row]
    bound = max((abs(value) for value in flat), default=1.0) or 1.0
    low, high = limits or ((-bound, bound) if signed else (min(flat), max(flat)))
    height = min(4.8, max(1.9, 0.34 * len(values) + 1.2))
    with course_style():
        figure, axes = new_figure(size=(7.2, height))
        colours = "RdBu" if signed else "cividis"
        image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high)
        figure.colorbar(image, ax=axes, label=unit, pad=0.02)
        label(axes, title, x, y)
        axes.grid(visible=False)
        _ticks(axes, rows, columns)
        if len(flat) <= MOST_NUMBERS:
            _numbers(axes, values, low, high, signed, digits)
    shape = f"{len(values)} by {len(values[0])}"
    axes_words = " by ".join(filter(None, (y, x)))
    what = ", ".join(filter(None, (axes_words, unit)))
    words = f"Heat map, {shape}: {what} between {min(flat):.3g} and {max(flat):.3g}."
    if rows and columns:
        top = flat.index(max(flat))
        words += f" Highest: {rows[top // len(columns)]}, {columns[top % len(columns)]}."
        words += _means(values, rows, columns)
    return describe(figure, titled(title, words))


def _means(values: Matrix, rows: Sequence[str], columns: Sequence[str]) -> str:
    """The mean of each row, or of each column where these are fewer; nothing if both are many."""
    names, lines = (
        (rows, values) if len(rows) <= len(columns) else (columns, [*zip(*values, strict=True)])
    )
    if len(names) > MOST_MEANS:
        return ""
    means = (f"{name} {sum(line) / len(line):.3g}" for name, line in zip(names, lines, strict=True))
    return f" Means: {'; '.join(means)}."


def _ticks(axes, rows: Sequence[str] | None, columns: Sequence[str] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        if names is None:
            axis.set_major_locator(MaxNLocator(integer=True))
        else:
            axis.set_ticks(range(len(names)), list(names))
    if columns is not None and max(map(len, columns)) > 4 and len(columns) > 8:
        axes.tick_params(axis="x", labelrotation=90)


def _numbers(axes, values: Matrix, low: float, high: float, signed: bool, digits: int) -> None:
    """Each number in the ink that can be read on its cell."""
    for line, row in enumerate(values):
        for column, value in enumerate(row):
            share = (value - low) / (high - low) if high > low else 1.0
            dark = (share < 0.2 or share > 0.8) if signed else share < 0.5
            ink = "white" if dark else INK
            text = f"{value:.{digits}f}".rstrip("0").rstrip(".") if value else "0"
            axes.text(column, line, text, ha="center", va="center", color=ink, fontsize=8)
