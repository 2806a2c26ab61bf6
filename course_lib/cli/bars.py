"""Progress bars for long runs: step, the number that matters, time left.

They are on stderr, so that stdout stays for results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

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

# What a learner watches in each phase: the metric's name in metrics.jsonl, and what to call it.
WATCHED = {
    "sft": ("loss", "train/nll"),
    "rl": ("reward", "reward/total"),
    "preference": ("accuracy", "preference/accuracy"),
}
QUIET_S = 10.0  # without a terminal: whoever reads a log thinks of a longer silence as an end
TITLES = {"sft": "SFT", "rl": "GRPO", "preference": "judge", "eval": "evaluate"}


class Bars:
    """One bar per phase, made when the phase reports its first step.

    Without a terminal (a log file, CI) a plain line is printed at every tenth of the way, at the
    end, and whenever the last one is ten seconds old.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.told_at = time.monotonic()
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

    def on_step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """The hook to hand to `run_all`, `train_sft`, `train_grpo`; the metrics name the phase."""
        phase = metrics["phase"]
        self._show(TITLES.get(phase, str(phase)), step, total, watched_text(metrics))

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """The hook to hand to `deploy`."""
        self._show(stage, done, total, "")

    def _show(self, title: str, step: int, total: int, watched: str) -> None:
        if not self.console.is_terminal:
            now = time.monotonic()
            tenth = step % max(1, total // 10) == 0
            if tenth or step == total or now - self.told_at >= QUIET_S:
                self.told_at = now
                self.console.print(f"{title} {step}/{total} {watched}".rstrip())
            return
        if title not in self.tasks:
            self.tasks[title] = self.progress.add_task(title, total=total, watched="")
        self.progress.update(self.tasks[title], completed=step, total=total, watched=watched)


def watched_text(metrics: Mapping[str, Any]) -> str:
    """The number to watch in this phase, or the stage that is being judged.

    >>> watched_text({"phase": "rl", "reward/total": 0.8125})
    'reward 0.812'
    """
    name, metric = WATCHED.get(metrics["phase"], ("", ""))
    return f"{name} {metrics[metric]:.3f}" if metric else metrics.get("stage", "")
