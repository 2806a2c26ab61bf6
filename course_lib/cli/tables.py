"""A finished run in a terminal: the before-and-after table, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from course_lib.checkpoints import Checkpoint
    from course_lib.compare import Comparison
    from course_lib.config import RunConfig

TABLE_WIDTH = 76  # a narrower terminal breaks its lines, and loses no number
STAGE_TITLES = {"base": "base", "sft": "SFT", "rl": "GRPO"}


def report_table(report: Mapping[str, Any]) -> Table:
    """One row per stage; a dash where there is nothing to check the answers against."""
    title = f"preset {report['preset']}, seed {report['seed']}, {report['seconds']:.0f} s"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("accuracy", "95 % interval", "greedy", "reward", "worked", "loss", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage, title in STAGE_TITLES.items():
        if numbers := report.get(stage):
            table.add_row(title, *_cells(numbers))
    return table


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    interval = numbers.get("interval")
    return [
        percent(numbers["accuracy"]),
        f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f} %" if interval else "-",
        percent((numbers.get("greedy") or {}).get("accuracy")),
        _fixed(numbers["mean_reward"], 2),
        percent(numbers["worked_share"]),
        _fixed(numbers.get("heldout_nll"), 2),
        _fixed(numbers["seconds"], 0),
    ]


def percent(share: float | None) -> str:
    """A share as a whole percentage, a dash for none.

    >>> percent(0.954), percent(None)
    ('95 %', '-')
    """
    return "-" if share is None else f"{share:.0%}".replace("%", " %")


def _fixed(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def print_report(config: RunConfig, out: Path, report: Mapping[str, Any]) -> None:
    """The end of `posttrain all`: the table, what was made, what to type next."""
    try:
        figures = save_figures("all", out)  # first: who reads what is printed may stop reading
    finally:
        Console(width=max(TABLE_WIDTH, Console().width)).print(report_table(report))
    if report["note"]:
        print(report["note"])
    if (win_rate := (report["rl"] or {}).get("win_rate_vs_sft")) is not None:
        print(f"The judge prefers GRPO's answer to SFT's in {percent(win_rate)} of the pairs.")
    _print_diagnosis(out)
    made = report["checkpoints"]
    print_paths({"folder": out, **figures, **made})
    sampler_path = made["rl_sampler" if "rl" in made else "sft_sampler"]
    ship = ["deploy", "--checkpoint", made.get("rl", made["sft"])]
    print_next(config, ["chat", "--base", sampler_path], ship)


def print_result(config: RunConfig, out: Path, checkpoint: Checkpoint) -> None:
    """The end of `posttrain sft` and `posttrain rl`."""
    _print_diagnosis(out)
    made = {"folder": out, "checkpoint": checkpoint.state_path}
    print_paths({**made, **save_figures(checkpoint.phase, out)})
    talk = ["chat", "--base", checkpoint.sampler_path]
    go_on = ["rl", "--sft-checkpoint", checkpoint.state_path]
    print_next(config, *([talk, go_on] if checkpoint.phase == "sft" else [talk]))


def save_figures(command: str, out: Path) -> dict[str, Path]:
    """The run's figures; where they find no room, the error tells that the run itself is whole."""
    from course_lib.plots.run import save_run_figures

    try:
        return save_run_figures(out)
    except OSError as error:
        again = shlex.join(["posttrain", command, "--resume", str(out)])
        error.add_note(f"the run itself is whole; its figures are drawn by: {again}")
        raise


def _print_diagnosis(out: Path) -> None:
    """What the metrics say is wrong, if anything."""
    from course_lib.diagnosis import diagnose
    from course_lib.metrics import read_metrics

    file = out / "metrics.jsonl"
    for found in diagnose(read_metrics(file)) if file.exists() else ():
        print(f"Diagnosis: {found}")


def print_comparison(found: Comparison, shown: int = 5) -> None:
    """The first prompts with both answers, then who wins how often, and who is faster."""
    for row in found.rows[:shown]:
        print(f"{row.prompt}\n  A: {row.a}\n  B: {row.b}")
    first, second = (f"{1000 * seconds:.0f} ms" for seconds in found.median_seconds)
    print(f"\nA is {found.a}, {first} an answer; B is {found.b}, {second} an answer (medians)")
    if found.win_rate_b is None or not (found.interval and found.wins_ties_losses):
        print(
            "No prompt has an answer to check: read, and judge for yourself (--out FILE has all)."
        )
        return
    wins, ties, losses = found.wins_ties_losses
    low, high = found.interval
    print(
        f"B wins {percent(found.win_rate_b)} ({100 * low:.0f}-{100 * high:.0f} %): "
        f"{wins} won, {ties} tied, {losses} lost"
    )
    if skipped := len(found.rows) - wins - ties - losses:
        print(f"Not judged: {skipped} prompts without an answer to check (--out FILE has all).")


def print_paths(paths: Mapping[str, str | Path]) -> None:
    """Name and path, a line each, never broken, so that they can be copied."""
    width = max(map(len, paths))
    for name, path in paths.items():
        print(f"{name:<{width}}  {path}")


def print_next(config: RunConfig, *commands: list[str]) -> None:
    """What one can do now: whole commands, with the options that lead to the same place."""
    place = {"model": config.model_name, "store": config.store, "backend": config.backend}
    options = [f"--{name}={value}" for name, value in place.items() if value not in (None, "auto")]
    print_commands(*(["posttrain", *command, *options] for command in commands))


def print_commands(*commands: list[str]) -> None:
    """Whole commands, quoted for a shell, ready to be copied."""
    print("\nNext:")
    for command in commands:
        print(f"  {shlex.join(command)}")
