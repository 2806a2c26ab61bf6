"""Commands that train: sft, rl, all. Each makes, or goes on with, one folder below runs/."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from course_lib.cli.options import RunOptions, with_run_options
from course_lib.errors import CourseError

if TYPE_CHECKING:
    from course_lib.checkpoints import StepHook
    from course_lib.client import CourseService
    from course_lib.config import RunConfig
    from course_lib.run_data import RunData

LOCK = ".lock"
BEFORE_THE_FIRST_STEP = {LOCK, "config.json", "command.json"}


@with_run_options
def sft(options: RunOptions) -> None:
    """Fine-tune with LoRA: learn to answer as the data does.

    \b
    posttrain sft --config tiny
    posttrain sft --config quick --data my.jsonl --set sft.learning_rate=1e-3
    """
    from course_lib.cli.tables import print_result
    from course_lib.pipeline import Command, run_sft, start_run

    with opened_run("sft", options) as run:
        start_run(run.config, run.out, Command("sft"), resume=run.resumed)
        result = run_sft(run.service, run.config, run.out, run.on_step, data=run.data)
    print_result(run.config, run.out, result.checkpoints[-1])


@with_run_options
def rl(
    options: RunOptions,
    sft_checkpoint: Annotated[
        str | None,
        typer.Option(metavar="tinker://...", help="Start from these weights, not from the base."),
    ] = None,
) -> None:
    """GRPO: prefer the answers that earned more than their siblings.

    \b
    posttrain rl --sft-checkpoint tinker://RUN/weights/NAME --config quick
    """
    from course_lib.cli.tables import print_result
    from course_lib.pipeline import Command, run_rl, start_run

    with opened_run("rl", options) as run:
        asked = Command("rl", sft_checkpoint)
        start = start_run(run.config, run.out, asked, resume=run.resumed).sft_checkpoint
        result = run_rl(run.service, run.config, run.out, start, run.on_step, data=run.data)
    print_result(run.config, run.out, result.checkpoints[-1])


@with_run_options
def all_(options: RunOptions) -> None:
    """SFT, then GRPO, each judged on held-out problems.

    \b
    posttrain all --config tiny
    posttrain all --config quick --seed 3 --set rl.loss_fn=ppo
    posttrain all --resume runs/20260101-120000-quick
    """
    from course_lib.cli.tables import print_report
    from course_lib.pipeline import run_all

    with opened_run("all", options) as run:
        if run.data.judged_on_training:
            print(
                "no conversation is held out, so the model is asked about those that it trained "
                "on; give more rows, or a file of others with --set sft.eval_path=FILE",
                file=sys.stderr,
            )
        report = run_all(
            run.service, run.config, run.out, run.on_step, resume=run.resumed, data=run.data
        )
    print_report(run.config, run.out, report)


class Stopped(Exception):
    """Ctrl-C ended a run; says how to go on."""


@dataclass(frozen=True)
class Run:
    """What a training command works with."""

    config: RunConfig
    data: RunData
    service: CourseService
    out: Path
    resumed: bool
    on_step: StepHook


@contextmanager
def opened_run(command: str, options: RunOptions) -> Iterator[Run]:
    """Settings, data, connection and progress bars, in the order in which they can be wrong.

    A run that fails before its first step leaves no folder; one that is stopped says how to go on.
    """
    from course_lib.cli.bars import Bars
    from course_lib.pipeline import new_folder
    from course_lib.run_data import load_run_data

    config = options.run_config()
    data = load_run_data(config)
    service = open_service(config, data, options.yes)
    out = options.resume or new_folder(config)
    existed = out.exists()
    try:
        with only_here(out), Bars() as bars, answering(service):
            yield Run(config, data, service, out, options.resume is not None, bars.on_step)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; {go_on(command, out)}") from None
    except Exception as error:
        if not existed and {file.name for file in out.glob("*")} <= BEFORE_THE_FIRST_STEP:
            shutil.rmtree(out, ignore_errors=True)
            with suppress(OSError):  # it holds other runs
                out.parent.rmdir()
        elif (out / "checkpoints.jsonl").exists():
            error.add_note(go_on(command, out))
        raise


@contextmanager
def answering(service: CourseService) -> Iterator[None]:
    """The server's address to an error that says only that nobody answers."""
    import tinker

    try:
        yield
    except tinker.APIConnectionError as error:  # after all the SDK's retries
        remedy = "is the server running?"
        raise CourseError(service.url, "does not answer any more", remedy) from error


def go_on(command: str, out: Path) -> str:
    """How a run that ended early goes on, and from where."""
    from course_lib.checkpoints import CheckpointLog

    line = shlex.join(["posttrain", command, "--resume", str(out)])
    last = None
    with suppress(CourseError):  # a damaged log is told when the run is resumed
        last = CheckpointLog(out).last()
    where = f"after {last.phase} step {last.step}" if last else "no checkpoint was saved yet"
    return f"go on with: {line} ({where})"


@contextmanager
def only_here(out: Path) -> Iterator[None]:
    """No other process trains in this folder meanwhile."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / LOCK, timeout=0):
            yield
    except Timeout:
        remedy = "wait for it, or stop it and go on with --resume"
        raise CourseError(str(out), "another process is training in it", remedy) from None


def open_service(config: RunConfig, data: RunData, yes: bool) -> CourseService:
    """Connect as the configuration says; before a hosted run, the estimate and the question."""
    from course_lib.client import choose, connect
    from course_lib.estimate import estimate_tokens

    if choose(config.backend).backend == "hosted":
        print(f"A hosted run costs money. Estimate: {estimate_tokens(config, data)}.")
        yes = yes or (sys.stdin.isatty() and typer.confirm("Go on?"))
    return connect(
        config.backend,
        model=None if config.model_name == "auto" else config.model_name,
        store=config.store,
        confirm=yes,
    )


COMMANDS = {"sft": sft, "rl": rl, "all": all_}
