"""Call a learner's function so that nothing it does stops the notebook: errors, loops, prints.

What is not covered: a loop inside one C call (`sum(iter(int, 1))`), which Python cannot interrupt.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from course_lib.checks.compare import close

TIME_LIMIT_S = 5.0


class _OutOfTime(BaseException):
    """Not an Exception, so that a learner's `except Exception` does not swallow it."""


@dataclass(frozen=True)
class Outcome:
    """What one call did: a value, or an error by name, or no end."""

    value: Any = None
    error: str = ""  # "ZeroDivisionError"; empty when it returned
    error_text: str = ""
    printed: str = ""
    out_of_time: bool = False
    changed_input: bool = False
    read_once: bool = False  # an iterator: here it was read, and its values are `value`

    def like(self, other: Outcome, same: Callable[[Any, Any], bool]) -> bool:
        """The same error by name, or the same value."""
        if self.error or other.error:
            return self.error == other.error
        return same(self.value, other.value)


def call(
    function: Callable[..., Any],
    case: tuple,
    observe: Callable[[Any, tuple], Any] | None = None,
    limit_s: float | None = None,
) -> Outcome:
    """Call `function` on a copy of the arguments, within a time limit, with its prints caught."""
    arguments, printed = copy.deepcopy(case), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            _limit(limit_s or TIME_LIMIT_S, getattr(function, "__code__", None)),
        ):
            returned = function(*arguments)
            value = listed(returned)
            seen = observe(value, arguments) if observe and value is not ... else value
    except _OutOfTime:
        return Outcome(error="out of time", printed=printed.getvalue(), out_of_time=True)
    except KeyboardInterrupt:
        raise  # the learner pressed the stop button
    except BaseException as error:
        text = " ".join(str(error).strip().split("\n")[:2])
        return Outcome(error=type(error).__name__, error_text=text, printed=printed.getvalue())
    changed = observe is None and not _unchanged(arguments, case)
    once = hasattr(returned, "__next__")
    return Outcome(seen, printed=printed.getvalue(), changed_input=changed, read_once=once)


def listed(value: Any) -> Any:
    """A list of what an iterator or a range gives; the rest as it is."""
    lazy = hasattr(value, "__next__") or isinstance(value, range)
    return list(itertools.islice(value, 100_000)) if lazy else value


def _unchanged(after: tuple, before: tuple) -> bool:
    comparable = (int, float, str, bool, list, tuple, dict)
    return all(close(a, b) for a, b in zip(after, before, strict=True) if isinstance(b, comparable))


@contextlib.contextmanager
def _limit(seconds: float, code: CodeType | None):
    """Raise `_OutOfTime` at the first line executed after the deadline, in any thread.

    `while True: pass` on one line never begins another, so the file of `code` is watched by steps.
    An import is neither counted nor cut off: torch, half imported, would be lost to the notebook.
    """
    deadline = time.monotonic() + seconds
    import_began = None

    def trace(frame, event, argument):
        nonlocal import_began
        if import_began is not None:
            return None
        if frame.f_code.co_name == "_find_and_load" and "importlib" in frame.f_code.co_filename:
            import_began = time.monotonic()
            return until_imported
        if event == "call" and code and frame.f_code.co_filename == code.co_filename:
            frame.f_trace_opcodes = True
        if time.monotonic() > deadline:
            raise _OutOfTime
        return trace

    def until_imported(frame, event, argument):
        nonlocal import_began, deadline
        if event == "return" and import_began is not None:
            deadline += time.monotonic() - import_began
            import_began = None
        return until_imported

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
