"""Sliders over one figure: displayed once, then only traits change, as notebook tests need it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from course_lib.errors import CourseError
from course_lib.widgets.display import picture_html, show_live

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Explorer:
    """`draw(**values)` is a pure function that gives a figure; `controls` are its arguments."""

    def __init__(self, draw: Callable[..., Figure], controls: Mapping[str, Any]) -> None:
        import ipywidgets

        self.draw, self.controls = draw, dict(controls)
        self.picture = ipywidgets.HTML()
        for control in self.controls.values():
            control.observe(self._redraw, "value")
        self._redraw()
        self.box = ipywidgets.VBox([*self.controls.values(), self.picture])

    @property
    def values(self) -> dict[str, Any]:
        """Where the controls stand."""
        return {name: control.value for name, control in self.controls.items()}

    def figure(self) -> Figure:
        """The figure for where the controls stand."""
        return self.draw(**self.values)

    def show(self) -> None:
        """Display it; in places without widgets the present figure is shown instead."""
        show_live(self.box, self.figure())

    def _redraw(self, change: Any = None) -> None:
        try:
            self.picture.value = picture_html(self.figure())
        except CourseError as error:  # a setting that makes no sense is told, not lost in a log
            self.picture.value = f"<p>{html.escape(str(error))}</p>"


def slider(name: str, low: float, high: float, value: float, step: float = 0.01) -> Any:
    """A slider that redraws when it is let go: drawing takes longer than moving."""
    import ipywidgets

    make = ipywidgets.IntSlider if isinstance(value, int) else ipywidgets.FloatSlider
    return make(value=value, min=low, max=high, step=step, description=name, **_look())


def choice(name: str, options: Any, value: Any) -> Any:
    """A slider over a few given values."""
    import ipywidgets

    return ipywidgets.SelectionSlider(options=options, value=value, description=name, **_look())


def dropdown(name: str, options: Any, value: Any) -> Any:
    """A menu."""
    import ipywidgets

    look = {key: setting for key, setting in _look().items() if key != "continuous_update"}
    return ipywidgets.Dropdown(options=options, value=value, description=name, **look)


def _look() -> dict[str, Any]:
    return {
        "continuous_update": False,
        "style": {"description_width": "190px"},
        "layout": {"width": "560px"},
    }
