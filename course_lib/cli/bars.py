"""Progress bars for long runs: step, the number that matters, time left.

They are on stderr, so that stdout stays for results.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

OnStep = Callable[[int, int, dict[str, float]], None]
# What a learner watches in each phase: the metric's name in metrics.jsonl, and what to call it.
WATCHED = {"sft": ("loss", "train/nll"), "rl": ("reward", "reward/total")}
TITLES = {"sft": "SFT", "rl": "GRPO", "eval": "evaluate"}


class Bars:
    """One bar per phase, made when the phase reports its first step.

    Without a terminal (a log file, CI) a plain line is printed at every tenth of the way.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[watched]:<14}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def on_step(self, phase: str) -> OnStep:
        """The hook to hand to `train_sft`, `train_grpo`: called with step, total, metrics."""

        def show(step: int, total: int, metrics: dict[str, float]) -> None:
            watched = watched_text(phase, metrics)
            if phase not in self.tasks:
                title = TITLES.get(phase, phase)
                self.tasks[phase] = self.progress.add_task(title, total=total, watched="")
            self.progress.update(self.tasks[phase], completed=step, total=total, watched=watched)
            if not self.console.is_terminal and step % max(1, total // 10) == 0:
                self.console.print(f"{TITLES.get(phase, phase)} {step}/{total} {watched}".rstrip())

        return show


def watched_text(phase: str, metrics: dict[str, float]) -> str:
    """The one number of this phase, or nothing while there is none.

    >>> watched_text("rl", {"reward/total": 0.8125})
    'reward 0.812'
    """
    name, metric = WATCHED.get(phase, ("", ""))
    return f"{name} {metrics[metric]:.3f}" if metric in metrics else ""
