"""A question and the answers of several models, as a picture for places without widgets."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from course_lib.plots.style import CYCLE, STAGE_COLOURS, STAGE_NAMES, course_style, new_figure
from course_lib.plots.words import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 62  # characters of an answer's line


def chat_figure(question: str, answers: Mapping[str, str]) -> Figure:
    """The question on top, one block per model below."""
    stage_colours = {STAGE_NAMES[stage]: colour for stage, colour in STAGE_COLOURS.items()}
    blocks = {name: _wrapped(text) for name, text in answers.items()}
    lines = 1 + sum(len(block) for block in blocks.values())
    with course_style():
        figure, axes = new_figure(size=(7.2, 0.28 * lines + 0.25 * len(blocks) + 0.5))
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_title(_plain(question))
        top = 0.0
        for number, (name, block) in enumerate(blocks.items()):
            axes.plot(
                [0.005, 0.005],
                [top, top + len(block)],
                color=stage_colours.get(name, CYCLE[number]),
                linewidth=4,
                linestyle="-",
                marker="",
            )
            axes.text(0.03, top + 0.5, name, fontweight="bold", va="center")
            for offset, line in enumerate(block):
                place = (0.2, top + offset + 0.5)
                axes.text(*place, line, va="center", family="DejaVu Sans Mono", fontsize=8.6)
            top += len(block) + 0.6
        axes.set_ylim(max(top, 1), -0.1)
    said = {name: textwrap.shorten(text, 90, placeholder=" ...") for name, text in answers.items()}
    words = "; ".join(f"{name} answers {text!r}" for name, text in said.items())
    return describe(figure, f"Asked {question!r}: {words}.")


def _wrapped(text: str, most: int = 4) -> list[str]:
    lines = textwrap.wrap(_plain(text), WIDTH) or ["(nothing)"]
    return (
        lines[:most] if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-4] + " ..."]
    )


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("$", r"\$")
