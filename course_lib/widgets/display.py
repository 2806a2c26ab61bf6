"""Put a figure, or the source of a function, below a cell so that every reader gets it.

A stored notebook is read where widgets are unknown (GitHub, nbviewer) and by screen readers, and
JupyterLab gives pictures no alt text. So a figure is followed by a line of words, and carries the
same words as its alt text.
"""

from __future__ import annotations

import base64
import html
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from course_lib.plots.words import description

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PIXELS = 100  # of width on the page per inch of figure; the picture itself is finer


def show(figure: Figure, words: str = "") -> None:
    """Display a figure and, below it, what it shows (by default its own description)."""
    _display(figure, words or description(figure), {})


def show_live(widget: Any, figure: Figure) -> None:
    """Display a widget once; where no widget can be shown, `figure` stands in its place."""
    view = widget._repr_mimebundle_()
    _display(figure, description(figure), {WIDGET_VIEW: view[WIDGET_VIEW]})


def show_source(*functions: Callable[..., Any]) -> None:
    """Display the library's own source of some functions: what a lesson explains is what runs."""
    from IPython.display import display

    for function in functions:
        text = inspect.getsource(function).rstrip()
        place = function.__module__.replace(".", "/") + ".py"
        markdown = f"`{place}`\n```python\n{text}\n```"
        display({"text/markdown": markdown, "text/plain": f"# {place}\n{text}"}, raw=True)


def picture_html(figure: Figure) -> str:
    """A figure as HTML with alt text and caption, for an HTML widget."""
    words = html.escape(description(figure))
    encoded = base64.b64encode(_png(figure)).decode()
    width = round(figure.get_figwidth() * PIXELS)
    return (
        f'<figure style="margin:0"><img alt="{words}" width="{width}" style="max-width:100%" '
        f'src="data:image/png;base64,{encoded}"><figcaption>{words}</figcaption></figure>'
    )


def _display(figure: Figure, words: str, live: dict[str, Any]) -> None:
    from IPython.display import display

    if not words:
        raise ValueError("a figure needs words: give it a description, or pass them to show()")
    picture = {"image/png": base64.b64encode(_png(figure)).decode()}
    width = round(figure.get_figwidth() * PIXELS)
    display(
        {**live, **picture, "text/plain": f"Figure: {words}"},
        raw=True,
        metadata={"image/png": {"alt": words, "width": width}},
    )
    if not live:
        caption = f"<small>Figure: {html.escape(words)}</small>"
        display({"text/html": caption, "text/plain": f"Figure: {words}"}, raw=True)


def _png(figure: Figure) -> bytes:
    return figure._repr_png_()  # type: ignore[attr-defined]  # style.new_figure's figures have it
