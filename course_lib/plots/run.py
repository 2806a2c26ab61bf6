"""What did this run do? Three pictures of one `posttrain all`: SFT loss, reward, accuracy.

Pure functions of the rows of `metrics.jsonl` and of `report.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.errors import CourseError
from course_lib.metrics import read_metrics
from course_lib.plots.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    STAGE_COLOURS,
    STAGE_HATCHES,
    STAGE_NAMES,
    STAGES,
    course_style,
    label,
    legend_above,
    moving_average,
    new_figure,
    percent_axis,
    save_figure,
    step_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def sft_loss_figure(rows: Rows) -> Figure:
    """Negative log-likelihood of training batches and of held-out conversations, by step."""
    steps, losses = series(rows, "sft", "train/nll")
    heldout_steps, heldout = series(rows, "sft", "test/nll", required=False)
    with course_style():
        figure, axes = new_figure()
        _noisy_line(axes, steps, losses, BLUE, "training batches, mean of 9")
        if heldout_steps:
            style = {"color": ORANGE, "linestyle": "--", "marker": "s"}
            axes.plot(heldout_steps, heldout, label="held-out conversations", **style)
        label(axes, "SFT: loss by step", "optimizer step", "loss (nats per token)")
        axes.set_ylim(bottom=0)
        step_axis(axes)
        axes.legend()
    return figure


def reward_figure(rows: Rows) -> Figure:
    """Mean reward of the sampled completions, by step; below it what they look like."""
    steps, rewards = series(rows, "rl", "reward/total")
    worked_steps, worked = series(rows, "rl", "env/worked_share", required=False)
    dead_steps, dead = dead_share(rows)
    with course_style():
        figure, (top, bottom) = new_figure(2, 1, size=(7.2, 4.8), sharex=True)
        _noisy_line(top, steps, rewards, BLUE, "sampled completions, mean of 9 steps")
        label(top, "GRPO: reward by step", "", "reward (mean)")
        top.set_ylim(bottom=min(0, *rewards))
        top.legend()
        if worked_steps:
            _noisy_line(bottom, worked_steps, worked, GREEN, "completions that show their working")
        if dead_steps:
            style = {"color": ORANGE, "linestyle": "--", "marker": ""}
            bottom.plot(
                dead_steps, moving_average(dead), label="groups with equal rewards", **style
            )
        label(bottom, "", "RL step", "share")
        percent_axis(bottom)
        step_axis(bottom)
        if worked_steps or dead_steps:
            legend_above(bottom)
    return figure


def accuracy_figure(report: Mapping[str, Any]) -> Figure:
    """Held-out accuracy with its 95 % interval, and the share of worked answers, of each stage."""
    stages = [stage for stage in STAGES if (report.get(stage) or {}).get("accuracy") is not None]
    if not stages:
        remedy = "plot the loss: this data has no answer that can be checked"
        raise CourseError("accuracy_figure", "the report holds no accuracy", remedy)
    with course_style():
        figure, (left, right) = new_figure(1, 2, sharey=True)
        accuracy = [report[stage]["accuracy"] for stage in stages]
        intervals = [report[stage].get("interval") for stage in stages]
        _stage_bars(left, stages, accuracy, intervals)
        label(left, "Held-out accuracy", "", "share of problems")
        _stage_bars(right, stages, [report[stage]["worked_share"] for stage in stages])
        label(right, "Answers that show their working", "", "")
        percent_axis(left)
        left.set_ylim(0, 1.12)  # room for the number above a full bar
    return figure


def save_run_figures(out: Path) -> dict[str, Path]:
    """PNGs beside a run's metrics.jsonl, for the phases that it holds; name -> path."""
    rows = read_metrics(out / "metrics.jsonl")
    phases = {row.get("phase") for row in rows}
    figures = {}
    if "sft" in phases:
        figures["sft_loss"] = (sft_loss_figure(rows), "Loss of SFT, by step.")
    if "rl" in phases:
        figures["reward"] = (reward_figure(rows), "Mean reward of GRPO, by step.")
    if (out / "report.json").exists():
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if report["base"]["accuracy"] is not None:
            figures["accuracy"] = (accuracy_figure(report), describe_accuracy(report))
    return {
        name: save_figure(figure, out / f"{name}.png", description)
        for name, (figure, description) in figures.items()
    }


def series(
    rows: Rows, phase: str, metric: str, required: bool = True
) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of one phase; rows without it are passed over."""
    found = [row for row in rows if row.get("phase") == phase and row.get(metric) is not None]
    if required and not found:
        remedy = "give the rows of a metrics.jsonl in which that phase has run"
        raise CourseError("metrics", f"no row of phase {phase!r} holds {metric!r}", remedy)
    return [row["step"] for row in found], [float(row[metric]) for row in found]


def dead_share(rows: Rows) -> tuple[list[int], list[float]]:
    """Share of groups whose completions all got the same reward: they teach nothing."""
    steps, dead = series(rows, "rl", "env/dead_groups", required=False)
    _, groups = series(rows, "rl", "env/groups", required=False)
    return steps, [d / n for d, n in zip(dead, groups, strict=True)]


def describe_accuracy(report: Mapping[str, Any]) -> str:
    """The accuracy figure in one sentence."""
    stages = [stage for stage in STAGES if (report.get(stage) or {}).get("accuracy") is not None]

    def told(metric: str) -> str:
        return ", ".join(f"{STAGE_NAMES[stage]} {report[stage][metric]:.0%}" for stage in stages)

    return f"Held-out accuracy: {told('accuracy')}. Worked answers: {told('worked_share')}."


def _noisy_line(axes: Axes, steps: list[int], values: list[float], colour: str, name: str) -> None:
    """Every value faintly, their moving average clearly."""
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1, linestyle="-", marker="")
    average = moving_average(values)
    axes.plot(steps, average, color=colour, linestyle="-", marker="", label=name)


def _stage_bars(
    axes: Axes, stages: list[str], values: list[float], intervals: Sequence[Any] = ()
) -> None:
    for position, (stage, value) in enumerate(zip(stages, values, strict=True)):
        colour, hatch = STAGE_COLOURS[stage], STAGE_HATCHES[stage]
        axes.bar(position, value, width=0.62, edgecolor="white", color=colour, hatch=hatch)
        top = value
        if intervals and intervals[position]:
            low, high = intervals[position]
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(position, value, yerr=error, fmt="none", ecolor=INK, capsize=4)
            top = max(value, high)
        axes.annotate(
            f"{value:.0%}", (position, top), (0, 3), textcoords="offset points", ha="center"
        )
    axes.set_xticks(range(len(stages)), [STAGE_NAMES[stage] for stage in stages])
    axes.grid(axis="x", visible=False)
