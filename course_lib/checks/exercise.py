"""What an exercise is: a reference, named wrong answers, hints, and the stub a learner starts from.

An answer is either a *function* (judged by calling it on cases from two seeds) or a *value* (judged
against what the reference gives for the facts that the notebook passes:
`check("00.1", guess, vocab_size=1024)`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from course_lib.checks.compare import close

NOT_ATTEMPTED = ...  # what every stub gives: `return ...` or `guess = ...`

Kind = Literal["code", "predict", "find the bug", "behaviour", "artefact"]
FIRST_SEED, SECOND_SEED = (
    1,
    2,
)  # the verdict may show cases of the first; numbers pasted from it fail the second


@dataclass(frozen=True)
class Mutant:
    """A wrong answer that learners really write, and the sentence that names the mistake."""

    answer: Callable[..., Any]  # same signature as the reference
    message: str


@dataclass(frozen=True)
class Property:
    """A claim that holds for every right answer; `holds(answer, *case)`."""

    holds: Callable[..., bool]
    message: str  # said when it does not hold


@dataclass(frozen=True)
class Exercise:
    """One exercise; `cases(rng)` gives argument tuples for `reference` and a learner's function."""

    id: str  # "05.1": lesson, number
    title: str
    kind: Kind
    reference: Callable[..., Any]
    cases: Callable[[random.Random], list[tuple]]
    mutants: dict[str, Mutant]
    hints: tuple[str, str, str]
    stub: str  # the source of the student edition's cell
    answers: Literal["function", "value"] = "function"
    same: Callable[[Any, Any], bool] | None = close  # None: only the properties judge
    properties: tuple[Property, ...] = ()
    observe: Callable[[Any, tuple], Any] | None = None  # (returned, arguments) -> what is compared
    one_seed: bool = False  # the cases are a fixed gallery

    @property
    def name(self) -> str:
        """The variable that the stub defines, which is what a learner hands to `check`."""
        for line in self.stub.splitlines():
            if line.startswith("def "):
                return line.removeprefix("def ").split("(")[0]
            if line[:1].isidentifier() and " = " in line:
                return line.split(" = ")[0]
        raise ValueError(f"{self.id}: the stub defines nothing")

    def cases_from(self, seed: int) -> list[tuple]:
        """The cases of one seed, the same on every machine."""
        return self.cases(random.Random(f"{self.id}/{seed}"))
