"""The one error a learner can cause: it says where, what, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CourseError(Exception):
    """A mistake that a person can mend, told in one line: place, finding, remedy.

    >>> print(CourseError("data/sft.jsonl:17", "role 'bot' is unknown", "use system or user"))
    data/sft.jsonl:17: role 'bot' is unknown; use system or user
    """

    def __init__(self, place: str, finding: str, remedy: str) -> None:
        super().__init__(f"{place}: {finding}; {remedy}")
        self.place = place
        self.finding = finding
        self.remedy = remedy


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an OSError name the file that it is about: a full disk names none, a draft its own."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def count_of(number: int, name: str) -> str:
    """A number and what it counts.

    >>> count_of(0, "error"), count_of(1, "error")
    ('0 errors', '1 error')
    """
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
