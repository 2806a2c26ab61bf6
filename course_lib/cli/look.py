"""Commands that look and change nothing: validate, doctor, diagnose, progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from course_lib.cli.options import Backend, Model, Store
from course_lib.dotenv import PROJECT
from course_lib.errors import CourseError, count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def validate(
    file: Annotated[str, typer.Argument(metavar="FILE|NAME", help="JSONL, or a dataset.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Held-out file: report prompts that stand in both."),
    ] = None,
    model: Model = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens a conversation may have.")] = 1024,
) -> None:
    """Name every fault of a file of conversations, at its line.

    Exit code 1 if there are errors; the file is never changed.

    \b
    posttrain validate data/conversations.jsonl --against data/heldout.jsonl
    posttrain validate data/broken.jsonl
    """
    from course_lib.config import find_file
    from course_lib.validation import validate_file

    report = validate_file(
        find_file(file),
        tokenizer_of(model),
        max_length,
        None if against is None else find_file(against),
    )
    print(report)
    raise typer.Exit(0 if report.ok else 1)


def doctor(
    backend: Backend = None,
    model: Model = None,
    store: Store = None,
) -> None:
    """What is installed, where calls go, how fast this machine is.

    \b
    posttrain doctor
    """
    from course_lib import doctor

    for line in doctor.examine(backend, model, store):
        print(line, flush=True)


def diagnose(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run with RL steps.")],
) -> None:
    """What is wrong with an RL run, in a sentence.

    \b
    posttrain diagnose runs/20260101-120000-quick
    """
    from course_lib.diagnosis import diagnose as find
    from course_lib.diagnosis import rl_steps
    from course_lib.metrics import read_metrics

    log = run / "metrics.jsonl"
    rows = read_metrics(log) if log.exists() else []
    steps = len(rl_steps(rows))
    if not steps:
        finding = "holds no RL steps" if run.is_dir() else "is no folder"
        remedy = "give the folder of a run of posttrain rl or posttrain all"
        raise CourseError(str(run), finding, remedy)
    well = f"{count_of(steps, 'RL step')}, nothing found that is wrong"
    print("\n".join(map(str, find(rows))) or well)


def progress() -> None:
    """Which exercises of the course are solved.

    \b
    posttrain progress
    """
    from course_lib.checks import progress

    progress()


def tokenizer_of(model: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; None: the shipped model's."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # a row over the model's context is our report's to tell
    place = model or str(PROJECT / "data" / "base-model")
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        finding = f"no tokenizer can be loaded ({str(error).strip().splitlines()[0]})"
        raise CourseError(
            place, finding, "give a folder with tokenizer.json, or a hub name"
        ) from error


COMMANDS = {"validate": validate, "doctor": doctor, "diagnose": diagnose, "progress": progress}
