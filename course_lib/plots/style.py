"""The one look of every figure: colours that survive colour blindness and a grey printer.

Colours are Okabe and Ito's, https://jfly.uni-koeln.de/color/. Colour never has a meaning alone:
lines differ in dash and marker, bars in hatch. The page is opaque white, so that a figure reads the
same on a dark and on a light site. No pyplot state: a figure is a value that a function returns.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, INK, GREY = "#CC79A7", "#56B4E9", "#222222", "#999999"
CYCLE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")

# A stage of training keeps its colour and hatch through the whole course.
STAGES = ("base", "sft", "rl")
STAGE_NAMES = {"base": "base", "sft": "SFT", "rl": "GRPO"}
STAGE_COLOURS = {"base": GREY, "sft": ORANGE, "rl": BLUE}
STAGE_HATCHES = {"base": "", "sft": "//", "rl": ".."}

DPI = 144
RC: dict[str, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#777777",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


@contextmanager
def course_style() -> Iterator[None]:
    """Everything drawn inside has the course's look; nothing outside changes."""
    import matplotlib as mpl
    from cycler import cycler

    cycle = cycler(color=CYCLE) + cycler(linestyle=DASHES) + cycler(marker=MARKERS)
    settings: dict[Any, Any] = {**RC, "axes.prop_cycle": cycle}
    with mpl.rc_context(settings):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.2, 3.2), **options: Any
) -> tuple[Figure, Any]:
    """An empty figure (size in inches) and its axes, laid out so that no label is cut off."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows as a picture, without pyplot."""

        def _repr_png_(self) -> bytes:
            return _png(self, "")

    figure = ShownFigure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and axis names; give the unit in brackets: `loss (nats per token)`."""
    axes.set(title=title, xlabel=x, ylabel=y)


def title_across(figure: Figure, title: str) -> None:
    """A title from the figure's left edge, where the axes' own would be too narrow or too many."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def whole_axis(axes: Axes) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def step_axis(axes: Axes) -> None:
    """Steps are counted from 0, in whole numbers."""
    whole_axis(axes)
    axes.set_xlim(left=0)


def percent_axis(axes: Axes, which: str = "y") -> None:
    """A share from 0 to 1, shown as 0 % to 100 % with a little air at both ends."""
    from matplotlib.ticker import PercentFormatter

    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(**{f"{which}lim": (-0.03, 1.03), f"{which}ticks": (0, 0.25, 0.5, 0.75, 1)})


def moving_average(values: Sequence[float], window: int = 9) -> list[float]:
    """Mean of each value and its neighbours, as many before as after: a slope is not shifted.

    >>> moving_average([0.0, 3.0, 6.0, 0.0], window=3)
    [0.0, 3.0, 3.0, 0.0]
    """
    last = len(values) - 1
    spans = [(i, min(window // 2, i, last - i)) for i in range(len(values))]
    return [sum(values[i - reach : i + reach + 1]) / (2 * reach + 1) for i, reach in spans]


def legend_above(axes: Axes) -> None:
    """The legend between title and axes, where it covers no data."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderaxespad=0.2)


def save_figure(figure: Figure, path: str | Path, description: str) -> Path:
    """Write a PNG with its description inside, for readers who cannot see it."""
    write_whole(path, _png(figure, description), durable=False)
    return Path(path)


def _png(figure: Figure, description: str) -> bytes:
    buffer = io.BytesIO()
    with course_style():  # hatches take their width when they are drawn
        figure.savefig(buffer, dpi=DPI, metadata={"Description": description, "Software": ""})
    return buffer.getvalue()
