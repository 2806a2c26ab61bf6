"""`posttrain …`: parse, call one library function, print.

What a person can mend is told in one line on stderr, never as a traceback: exit code 1 for a bad
file, value or place, 2 for a bad command line. Heavy imports stand inside the commands, so that
`--help` answers at once.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

import typer
from typer.exceptions import Abort, TyperException

from course_lib.cli import look, run, serving, shipping
from course_lib.errors import CourseError

STOPPED = 130  # exit code after Ctrl-C (or `kill`): 128 and the signal's number

app = typer.Typer(
    name="posttrain",
    help="Post-train a language model: validate conversations, SFT, GRPO, evaluate, talk to it.",
    epilog="Start with: posttrain all --config tiny",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for room in (look, run, serving, shipping):
    for name, command in room.COMMANDS.items():
        app.command(name)(command)


def entry() -> NoReturn:
    """`posttrain` itself: one command, and the process ends with its exit code.

    It ends at once: threads of the SDK and of torch may be in the middle of something, and would
    crash if the interpreter were taken apart around them.
    """
    code = 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill`, a batch system: as Ctrl-C
    atexit.register(lambda: leave(code))  # first in, last out: after everybody else's last words
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # at the very end
        code = STOPPED
    with suppress(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who presses Ctrl-C twice means it once
    sys.exit(code)


def leave(code: int) -> NoReturn:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed from the start
        with suppress(OSError, ValueError):  # a pipe that nobody reads, a closed one
            stream.flush()
    os._exit(code)


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        code = app(arguments or ["--help"], prog_name="posttrain", standalone_mode=False) or 0
        if code == STOPPED:  # typer's word for Ctrl-C
            print("stopped", file=sys.stderr)
        return code
    except run.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except TyperException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "posttrain"
        message = " ".join(error.format_message().split()).rstrip(".")
        print(f"{where}: {message}; try '{where} --help'", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Abort):
        print("stopped", file=sys.stderr)
        return STOPPED
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print("\n".join([line, *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 1


def one_line(error: Exception) -> str | None:
    """What a person can mend, in a line; None for a fault of ours, which keeps its traceback."""
    if isinstance(error, CourseError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        place = error.filename or "this machine"
        return f"{place}: {error.strerror}; free what it needs, or choose another place"
    if type(error).__module__.split(".")[0] == "tinker":
        from course_lib import checkpoints

        return f"the back end refused: {checkpoints.one_line(error)}"
    return None
