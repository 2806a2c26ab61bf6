"""LoRA: the spectrum of a change, and a sweep of rank, alpha and learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import (
    BLUE,
    CYCLE,
    DASHES,
    GREY,
    INK,
    MARKERS,
    course_style,
    label,
    new_figure,
    percent_axis,
    step_axis,
)
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = tuple[int, float, float]  # rank, alpha, learning rate
Setting = tuple[int, float]  # rank, learning rate


def spectrum_figure(singular_values: Sequence[float], rank: int, title: str) -> Figure:
    """Singular values of a change, and the share of its energy that the first ranks keep."""
    energy = [value**2 for value in singular_values]
    kept = [sum(energy[: i + 1]) / sum(energy) for i in range(len(energy))]
    ranks = list(range(1, len(energy) + 1))
    with course_style():
        figure, (left, right) = new_figure(1, 2, size=(7.2, 3.0))
        colours = [BLUE if r <= rank else GREY for r in ranks]
        edge = 0.7 if len(ranks) <= 40 else 0  # between many thin bars, edges would hide them
        look = {"color": colours, "edgecolor": "white", "linewidth": edge}
        bars = left.bar(ranks, list(singular_values), width=0.9 if edge else 1.0, **look)
        for bar in list(bars)[:rank]:
            bar.set_hatch("//")
        label(left, title, "number", "singular value")
        right.plot(ranks, kept, color=BLUE, linestyle="-", marker="")
        right.plot([rank], [kept[rank - 1]], marker="o", color=INK, markersize=8)
        text = f"rank {rank} keeps {kept[rank - 1]:.0%}"
        right.annotate(text, (rank, kept[rank - 1]), (8, -14), textcoords="offset points")
        label(right, "Energy kept", "rank", "share")
        percent_axis(right)
    return describe(figure, titled(title, f"rank {rank} keeps {kept[rank - 1]:.0%} of the energy."))


def kept_figure(
    ranks: Sequence[int], energy: Sequence[float], improvement: Sequence[float], title: str
) -> Figure:
    """By the rank a change is cut to: the share of its energy kept, and of what it improved."""
    with course_style():
        figure, axes = new_figure()
        for number, (name, values) in enumerate(
            {"improvement kept": improvement, "energy kept": energy}.items()
        ):
            look = {"color": CYCLE[number], "linestyle": DASHES[number], "marker": MARKERS[number]}
            axes.plot(range(len(ranks)), list(values), label=name, **look)
        axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        label(axes, title, "rank that the change is cut to", "share")
        percent_axis(axes)
        axes.set_ylim(-0.03, max(1.03, 1.03 * max(improvement)))
        axes.legend(loc="lower right")
    pairs = zip(ranks, improvement, energy, strict=True)
    words = "; ".join(f"rank {r}: {i:.0%} and {e:.0%}" for r, i, e in pairs)
    return describe(figure, f"{title}, improvement and energy kept. {words}.")


def lora_run_figure(runs: Mapping[Run, Sequence[float]], chosen: Run, every: int = 1) -> Figure:
    """One run of a sweep: its loss each `every` steps, and its last one among other rates'."""
    rank, alpha, rate = chosen
    curve = list(runs[chosen])
    rates = sorted({r for _, _, r in runs})
    finals = [(r, runs[rank, alpha, r][-1]) for r in rates if (rank, alpha, r) in runs]
    finals = [(r, loss) for r, loss in finals if math.isfinite(loss)]
    # As high as the runs begin, and as high as this one rises: of others only what fits is seen.
    top = 1.15 * max(*(values[0] for values in runs.values()), *filter(math.isfinite, curve))
    with course_style():
        figure, (left, right) = new_figure(1, 2, size=(7.2, 3.0))
        for other in runs.values():
            left.plot(
                [every * i for i in range(len(other))],
                list(other),
                color="#D5D5D5",
                linewidth=0.8,
                linestyle="-",
                marker="",
            )
        steps = [every * i for i in range(len(curve))]
        left.plot(steps, curve, color=BLUE, linestyle="-", marker="")
        left.set_ylim(0, top)
        title = f"rank {rank}, alpha {alpha:g}, rate {rate:g}"
        label(left, title, "step (grey: the other runs)", "held-out loss (nats)")
        step_axis(left)
        right.plot([r for r, _ in finals], [loss for _, loss in finals], color=BLUE, linestyle="--")
        beyond = [r for r, loss in finals if loss > top]  # off the picture: an arrow tells
        right.plot(beyond, [0.96 * top] * len(beyond), color=BLUE, marker="^", linestyle="")
        if math.isfinite(curve[-1]):
            right.plot(
                [rate], [curve[-1]], marker="o", markersize=13, markerfacecolor="none", color=INK
            )
        right.set_xscale("log")
        right.set_ylim(0, top)
        label(right, "Last loss by rate", "learning rate (log scale)", "held-out loss (nats)")
    end = (
        f"{curve[0]:.2f} to {curve[-1]:.2f}" if math.isfinite(curve[-1]) else "upwards: it blew up"
    )
    words = f"rank {rank}, alpha {alpha:g}, learning rate {rate:g}"
    return describe(figure, f"A run with {words}: held-out loss from {end} nats.")


def sweep_figure(losses: Mapping[Setting, float], chosen: Setting | None = None) -> Figure:
    """Held-out loss by learning rate, one line per rank; a run that blew up stands at the top."""
    ranks = sorted({rank for rank, _ in losses})
    rates = sorted({rate for _, rate in losses})
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    top = max(finite) * 1.1  # where a run without a finite loss is drawn
    with course_style():
        figure, axes = new_figure()
        for number, rank in enumerate(ranks):
            known = [(rate, losses[rank, rate]) for rate in rates if (rank, rate) in losses]
            values = [loss if math.isfinite(loss) else top for _, loss in known]
            style = {"color": CYCLE[number], "linestyle": DASHES[number]}
            axes.plot(
                [rate for rate, _ in known],
                values,
                label=f"rank {rank}",
                marker=MARKERS[number],
                **style,
            )
        if chosen is not None and math.isfinite(losses.get(chosen, math.nan)):
            ring = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "color": INK}
            axes.plot([chosen[1]], [losses[chosen]], linestyle="", **ring)
        for rate in sorted({rate for (_, rate), loss in losses.items() if not math.isfinite(loss)}):
            axes.annotate(
                "blew up",
                (rate, top),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes, top)
        label(axes, "The learning rate decides", "learning rate (log)", "held-out loss (nats, log)")
        axes.legend()
    best = min(losses, key=lambda key: losses[key] if math.isfinite(losses[key]) else math.inf)
    words = f"lowest held-out loss {losses[best]:.3g} at rank {best[0]}, learning rate {best[1]:g}"
    return describe(figure, f"Sweep over ranks {ranks}: {words}.")


def _plain_ticks(axes: Axes, top: float) -> None:
    """Losses on a log scale with numbers that one can read: 0.5, 1, 2."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    places = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
    axes.yaxis.set_major_locator(FixedLocator(places))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(top=1.15 * top)
