"""Commands that train: sft, rl, all. Each makes, or goes on with, one folder below runs/."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from course_lib.cli.options import RunOptions, with_run_options

if TYPE_CHECKING:
    from course_lib.client import CourseService
    from course_lib.config import RunConfig


@with_run_options
def sft(options: RunOptions) -> None:
    """Supervised fine-tuning with LoRA: the model learns to answer as the data does.

    \b
    posttrain sft --config tiny
    posttrain sft --config quick --data my.jsonl --set sft.learning_rate=1e-3
    """
    from course_lib.cli.bars import Bars
    from course_lib.cli.tables import print_result
    from course_lib.pipeline import new_folder, run_sft, start_run
    from course_lib.run_data import load_run_data

    config = options.run_config()
    data = load_run_data(config)
    service = open_service(config, options.yes)
    out = options.resume or new_folder(config)
    start_run(config, out, resume=options.resume is not None)
    with Bars() as bars:
        result = run_sft(service, config, out, bars.on_step, data=data)
    print_result(config, out, result.checkpoints[-1])


@with_run_options
def rl(
    options: RunOptions,
    sft_checkpoint: Annotated[
        str | None,
        typer.Option(metavar="tinker://...", help="Start from these weights, not from the base."),
    ] = None,
) -> None:
    """GRPO: sample groups of answers, prefer those that earned more than their siblings.

    \b
    posttrain rl --sft-checkpoint tinker://RUN/weights/NAME --config quick
    """
    from course_lib.cli.bars import Bars
    from course_lib.cli.tables import print_result
    from course_lib.pipeline import new_folder, run_rl, start_run
    from course_lib.run_data import load_run_data

    config = options.run_config()
    data = load_run_data(config)
    service = open_service(config, options.yes)
    out = options.resume or new_folder(config)
    start_run(config, out, resume=options.resume is not None)
    with Bars() as bars:
        result = run_rl(service, config, out, sft_checkpoint, bars.on_step, data=data)
    print_result(config, out, result.checkpoints[-1])


@with_run_options
def all_(options: RunOptions) -> None:
    """The whole job: SFT, then GRPO, each judged on held-out problems beside the base model.

    \b
    posttrain all --config tiny
    posttrain all --config quick --seed 3 --set rl.loss_fn=ppo
    posttrain all --resume runs/20260101-120000-quick
    """
    from course_lib.cli.bars import Bars
    from course_lib.cli.tables import print_report
    from course_lib.pipeline import new_folder, run_all

    config = options.run_config()
    service = open_service(config, options.yes)
    out = options.resume or new_folder(config)
    with Bars() as bars:
        report = run_all(service, config, out, bars.on_step, resume=options.resume is not None)
    print_report(config, out, report)


def open_service(config: RunConfig, yes: bool) -> CourseService:
    """Connect as the configuration says; before a hosted run, the estimate and the question."""
    from course_lib.client import choose, connect
    from course_lib.estimate import estimate_tokens
    from course_lib.run_data import load_run_data

    estimate = None
    if choose(config.backend).backend == "hosted":
        estimate = str(estimate_tokens(config, load_run_data(config)))
        if not yes and sys.stdin.isatty():
            yes = typer.confirm(f"This run is hosted and costs money: {estimate}. Go on?", err=True)
        elif yes:
            print(f"Estimate: {estimate}")
    return connect(
        config.backend,
        model=None if config.model_name == "auto" else config.model_name,
        store=config.store,
        confirm=yes,
        estimate=estimate,
    )


COMMANDS = {"sft": sft, "rl": rl, "all": all_}
