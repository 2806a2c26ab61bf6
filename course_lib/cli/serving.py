"""Commands that answer: engine (for programs), chat (for people)."""

from __future__ import annotations

import io
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from course_lib.cli.options import Backend, Model, Store, Yes
from course_lib.errors import CourseError
from course_lib.faults import is_text

NOT_UTF8 = ("it is not UTF-8 text", "write it again, or set the terminal to UTF-8")


def engine(
    model: Model = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Serve a folder under a name; repeatable."),
    ] = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
    store: Store = None,
    host: Annotated[str, typer.Option(help="Another than loopback needs --keys.")] = "127.0.0.1",
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One learner a line: NAME KEY.")
    ] = None,
) -> None:
    """A Tinker-compatible server, for other programs.

    It prints what they must export, then answers until Ctrl-C.

    \b
    posttrain engine --port 8100
    posttrain engine --alias meta-llama/Llama-3.2-1B=data/base-model
    """
    from course_lib.client import check_sdk_version
    from course_lib.engine import serve_forever

    check_sdk_version()
    aliases = dict(_name_and_folder(each) for each in alias or [])
    serve_forever(model=model, aliases=aliases, port=port, store=store, host=host, keys=keys)


def chat(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="[tinker://...]...", help="Who answers.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The untrained model beside them.")] = False,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Ask this once, and end.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 = the likeliest token, always.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answers.")] = None,
    backend: Backend = None,
    model: Model = None,
    store: Store = None,
    yes: Yes = False,
) -> None:
    """Talk to checkpoints, side by side if there are several.

    Without one the base model answers. An empty line ends the conversation.

    \b
    posttrain chat tinker://RUN/sampler_weights/NAME
    posttrain chat --base tinker://RUN/sampler_weights/NAME --prompt "What is 23 + 45 + 61?"
    """
    from course_lib.chat import BASE, MessageTooLong, open_speakers
    from course_lib.client import connect

    if prompt is not None and not prompt.strip():
        raise CourseError("--prompt", "nothing is asked", "write a question, or leave it out")
    if prompt is not None and not is_text(prompt):
        raise CourseError("--prompt", *NOT_UTF8)
    if prompt is None:
        _prepare_input()
    if not 0 <= temperature < math.inf:
        raise CourseError("--temperature", f"{temperature} is out of range", "use 0 or more")
    names = [*([BASE] if base or not checkpoints else []), *(checkpoints or [])]
    service = connect(backend, model=model, store=store, confirm=yes, quiet=prompt is not None)
    speakers = open_speakers(
        service, names, temperature=temperature, max_tokens=max_tokens, seed=seed
    )
    while text := prompt or _ask():
        for speaker in speakers:
            try:
                answer = speaker.say(text)
            except MessageTooLong as error:
                if prompt:
                    raise
                print(error, file=sys.stderr)
                continue
            print(answer if len(speakers) == 1 else f"{speaker.short_name}: {answer}", flush=True)
        if prompt:
            break


def _prepare_input() -> None:
    """Raises CourseError if nobody can type; a byte that is not UTF-8 is to cost its line only."""
    if sys.stdin is None:
        raise CourseError("standard input", "it is closed", "ask with --prompt instead")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # somebody has read from it before
            sys.stdin.reconfigure(errors="surrogateescape")


def _ask() -> str:
    """The next thing the person types; empty when they are done (an empty line or Ctrl-D)."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return ""
        if is_text(text):
            return text
        print(CourseError("your message", *NOT_UTF8), file=sys.stderr)


def _name_and_folder(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise CourseError("--alias", f"{text!r} is no alias", "write NAME=FOLDER")
    return name, folder


COMMANDS = {"engine": engine, "chat": chat}
