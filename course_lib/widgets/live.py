"""A training dashboard with buttons that work while it trains.

    dashboard = LiveTraining()
    result = await dashboard.run(train_sft, client, data, config, tokenizer=tokenizer)

A click reaches a kernel that awaits, and never one that is busy in a loop. So the training runs in
a thread and the cell awaits it: the buttons live, and Run All still waits for the end. The widget
is displayed once; only its traits change.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from course_lib.checkpoints import StopTraining
from course_lib.plots.curves import live_figure
from course_lib.widgets.display import WIDGET_VIEW, picture_html, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REDRAW_S = 0.8  # between two pictures: drawing must not slow the training down


class LiveTraining:
    """Loss or reward, dead groups and ratio while it trains; Stop, Resume and Finish."""

    def __init__(self) -> None:
        import ipywidgets

        self.stop = _button("Stop", "hold the training after this step", self._on_stop)
        self.resume = _button("Resume", "go on where it was stopped", self._on_resume)
        self.finish = _button("Finish", "save a checkpoint and end here", self._on_finish)
        self.status, self.picture = ipywidgets.HTML(), ipywidgets.HTML()
        self.bar = ipywidgets.IntProgress(value=0, max=1)
        buttons = ipywidgets.HBox([self.stop, self.resume, self.finish, self.bar])
        self.box = ipywidgets.VBox([buttons, self.status, self.picture])
        self._start_anew()

    def _start_anew(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.total = self.bar.value = 0
        # New ones: a thread that an interrupt has left in its last step keeps those it was given.
        self._going, self._finish = threading.Event(), threading.Event()
        self._going.set()
        self._drawn = 0.0
        self._end = ""  # how the run ended, if not by its last step
        self.status.value = "waiting for the first step"
        self._enable(stop=True)

    async def run(self, train: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """Call `train(*arguments, on_step=..., **settings)` in a thread; return its result."""
        if self._finish.is_set() or self.rows:  # it has run before
            self._start_anew()
        _display_once(self.box)
        loop = asyncio.get_running_loop()
        going, finish = self._going, self._finish

        def on_step(step: int, total: int, metrics: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(take_in, step, total, metrics)
            while not going.wait(0.1) and not finish.is_set():
                pass
            if finish.is_set():
                raise StopTraining

        def take_in(step: int, total: int, metrics: dict[str, Any]) -> None:
            if finish is self._finish:  # else a step of an earlier run
                self.update(step, total, metrics)

        try:
            result = await asyncio.to_thread(train, *arguments, on_step=on_step, **settings)
        except BaseException:
            self._end_with(", interrupted: the weights keep these steps")
            self._redraw()
            raise
        self._end_with(", ended here by Finish" if self._finish.is_set() else "")
        await asyncio.sleep(0)  # the last step's update
        self.picture.value = ""  # the lasting picture follows, for readers without widgets, too
        show(self.figure())
        return result

    def figure(self) -> Figure:
        """The dashboard's picture: a pure function of the rows so far."""
        return live_figure(self.rows, self.total)

    def update(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """Take one step's metrics in; only traits change, on the kernel's own thread."""
        self.rows.append({"step": step, **metrics})
        self.total = self.bar.max = total
        self.bar.value = step
        self.status.value = self._words()
        held = not self._going.is_set()
        if held or time.monotonic() - self._drawn > REDRAW_S:
            self._redraw()

    def _redraw(self) -> None:
        if self.rows:
            self.picture.value = picture_html(self.figure())
            self._drawn = time.monotonic()

    def _end_with(self, words: str) -> None:
        self._end = words
        self._finish.set()  # an interrupted cell must not leave the thread training
        self._enable()
        if self.rows:
            self.status.value = self._words()

    def _words(self) -> str:
        row = self.rows[-1]
        name, value = next(
            ((words, row[key]) for key, words in _SHOWN.items() if key in row), ("", 0.0)
        )
        held = "" if self._going.is_set() else ", stopped: Resume goes on, Finish ends here"
        state = self._end if self._finish.is_set() else held
        return f"step {row['step']} of {self.total}, {name} {value:.3f}{state}"

    def _on_stop(self, _: Any) -> None:
        self._going.clear()
        self._enable(resume=True)
        self.status.value = "stopping after this step; Resume goes on, Finish ends here"

    def _on_resume(self, _: Any) -> None:
        self._going.set()
        self._enable(stop=True)
        self.status.value = "going on"

    def _on_finish(self, _: Any) -> None:
        self._finish.set()
        self._enable()
        self.status.value = "saving a checkpoint"

    def _enable(self, stop: bool = False, resume: bool = False) -> None:
        self.stop.disabled, self.resume.disabled = not stop, not resume
        self.finish.disabled = not (stop or resume)


_SHOWN = {"reward/total": "reward", "train/nll": "loss"}


def _button(name: str, tooltip: str, on_click: Callable[[Any], None]) -> Any:
    import ipywidgets

    button = ipywidgets.Button(description=name, tooltip=tooltip, layout={"width": "90px"})
    button.on_click(on_click)
    return button


def _display_once(widget: Any) -> None:
    from IPython.display import display

    words = "Live dashboard: run this cell to see it move."
    view = widget._repr_mimebundle_()[WIDGET_VIEW]
    display({WIDGET_VIEW: view, "text/plain": words}, raw=True)
