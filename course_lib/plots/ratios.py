"""Importance ratios: their histogram by sign of advantage; three losses with their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.plots.style import (
    BLUE,
    CYCLE,
    DASHES,
    INK,
    VERMILLION,
    course_style,
    label,
    new_figure,
)
from course_lib.plots.words import describe, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = (0.1, 10.0)  # ratios beyond these are counted in the outermost bars
# Loss and gradient by ratio; None for a loss whose gradient is not its slope.
Curve = tuple[Sequence[float] | None, Sequence[float]]


def ratio_histogram(
    ratios: Sequence[float],
    advantages: Sequence[float],
    clip: tuple[float, float] | None = (0.8, 1.2),
    title: str = "How far has the policy moved?",
) -> Figure:
    """Ratios of tokens with positive and with negative advantage, and what PPO's clip cuts off."""
    import numpy as np

    up = [r for r, a in zip(ratios, advantages, strict=True) if a > 0]
    down = [r for r, a in zip(ratios, advantages, strict=True) if a < 0]
    low, high = max(SHOWN[0], min([0.5, *ratios])), min(SHOWN[1], max([2.0, *ratios]))
    edges = np.geomspace(low * 0.98, high * 1.02, 41)
    with course_style():
        figure, axes = new_figure()
        looks = ((up, 1, "A > 0", BLUE, "//"), (down, -1, "A < 0", VERMILLION, ".."))
        for values, sign, name, colour, hatch in looks:
            counts = sign * np.histogram(np.clip(values, low, high), bins=edges)[0]
            look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
            axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", label=name, **look)
        axes.axhline(0, color=INK, linewidth=0.8)
        if clip:
            look = {"color": INK, "linestyle": "--", "linewidth": 1}
            axes.axvline(clip[0], label="PPO's clip range", **look)
            axes.axvline(clip[1], **look)
        axes.set_xscale("log")
        _plain_ticks(axes)
        axes.set_yscale("symlog", linthresh=5)  # a few moved tokens among hundreds must be seen
        most = max(10, *(abs(end) for end in axes.get_ylim()))
        ticks = (2, 5, 10, 20, 50) if most < 100 else (5, 10, 100, 1000)
        axes.set_yticks([t for tick in (0, *ticks) for t in {-tick, tick} if tick <= most])
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")  # down is a count, too
        label(axes, title, "ratio = p(trainer) / p(sampler), log scale", "tokens, log scale")
        axes.legend(loc="upper right")
    words = f"{len(up) + len(down)} tokens, ratios {min(ratios):.2g} to {max(ratios):.2g}"
    if clip:
        lost = sum(r > clip[1] for r in up) + sum(r < clip[0] for r in down)
        share = lost / max(1, len(up) + len(down))
        words += f"; silent under PPO's clip {clip[0]} .. {clip[1]}: {share:.0%}"
    return describe(figure, titled(title, f"Histogram of ratios: {words}."))


def _plain_ticks(axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def losses_figure(
    ratios: Sequence[float],
    curves: Mapping[str, Curve],
    advantage: float,
    ratio: float,
    clip: tuple[float, float],
) -> Figure:
    """Loss and gradient of several losses over the ratio, with one ratio marked on each curve.

    A loss whose gradient is not its slope is None: drawn, it would only mislead.
    """
    nearest = min(range(len(ratios)), key=lambda i: abs(ratios[i] - ratio))
    with course_style():
        figure, (left, right) = new_figure(1, 2, size=(7.2, 3.3), sharex=True)
        for number, (name, pair) in enumerate(curves.items()):
            for axes, values in zip((left, right), pair, strict=True):
                if values is None:
                    continue
                style = {"color": CYCLE[number], "linestyle": DASHES[number], "marker": ""}
                axes.plot(ratios, values, label=name, linewidth=2.4 - 0.5 * number, **style)
                mark = {"color": CYCLE[number], "marker": "osD"[number % 3], "linestyle": ""}
                axes.plot([ratios[nearest]], [values[nearest]], **mark)
        for axes in (left, right):
            for bound in clip:
                axes.axvline(bound, color=INK, linestyle=":", linewidth=1)
        label(left, f"Loss of one token, A = {advantage:+.2g}", "ratio", "loss")
        label(right, "Gradient by its logprob", "ratio", "gradient")
        handles, names = right.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    at = ", ".join(f"{name} {pair[1][nearest]:+.2g}" for name, pair in curves.items())
    words = f"at ratio {ratios[nearest]:.2f} and advantage {advantage:+.2g} the gradients are: {at}"
    return describe(figure, f"Three losses; {words}.")
