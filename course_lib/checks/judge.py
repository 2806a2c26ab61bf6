"""Judge one answer: passed, not attempted, or the mistake in words. Prints and records nothing.

The order matters: a named mistake comes before a broken property, and both before "yours gives ...,
it should be ...", because a name teaches and a number does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from course_lib.checks.calling import Outcome, call, listed
from course_lib.checks.compare import close, describe, plain
from course_lib.checks.exercise import (
    FIRST_SEED,
    NOT_ATTEMPTED,
    SECOND_SEED,
    Exercise,
    Property,
)

Status = Literal["passed", "not yet", "not attempted"]


@dataclass(frozen=True)
class Verdict:
    """What `check` prints. `mistake` is the mutant's name when one was recognised."""

    status: Status
    text: str
    mistake: str | None = None


NOTHING = Verdict("not attempted", "")


def judge(exercise: Exercise, answer: Any, given: dict[str, Any]) -> Verdict:
    """The verdict on `answer`; `given` are the facts for a value answer."""
    if answer is NOT_ATTEMPTED or answer is None:
        return NOTHING
    if exercise.answers == "value":
        return _judge_value(exercise, answer, given)
    if not callable(answer):
        return _not_yet(
            f"`check` wants the function itself, not what it returns: check({exercise.id!r}, "
            f"{exercise.name})."
        )
    if inspect.iscoroutinefunction(answer):
        return _not_yet(
            f"It is an `async def`, which does nothing until it is awaited, and the cells below "
            f"just call {exercise.name}: write it with a plain `def`, without `await`."
        )
    return _judge_function(exercise, answer)


def parameters(exercise: Exercise) -> list[str]:
    """The names of the reference's arguments, for sentences and for the facts of a value answer."""
    return list(inspect.signature(exercise.reference).parameters)


def _not_yet(text: str, mistake: str | None = None) -> Verdict:
    return Verdict("not yet", text, mistake)


def _judge_value(exercise: Exercise, answer: Any, given: dict[str, Any]) -> Verdict:
    """Compare a value with what the reference, and each wrong answer, gives for the same facts."""
    if callable(answer):
        return _not_yet(f"`check` wants a value here: call your function and pass {exercise.name}.")
    if callable(getattr(type(answer), "result", None)):
        return _not_yet(
            f"{exercise.name} is a future: the call was sent, and nobody has taken what it gives. "
            "Add .result(), and go on with that."
        )
    same = exercise.same or close
    facts = tuple(given[name] for name in parameters(exercise))
    broken = _broken_property(exercise, answer, [facts])
    right = exercise.same is None or same(answer, exercise.reference(*facts))
    if right and not broken:
        return Verdict("passed", "")
    for name, mutant in exercise.mutants.items():
        if same(answer, mutant.answer(*facts)):
            return _not_yet(mutant.message, name)
    if isinstance(answer, str) and not isinstance(exercise.reference(*facts), str | dict):
        return _not_yet(
            "That is text. Write the value itself, or the formula in Python, without quotes."
        )
    return _not_yet(broken or f"{describe(answer)} is not it. Ask hint({exercise.id!r}).")


def _judge_function(exercise: Exercise, answer: Any) -> Verdict:
    first = exercise.cases_from(FIRST_SEED)
    second = [] if exercise.one_seed else exercise.cases_from(SECOND_SEED)
    cases = first + second
    outcomes = _outcomes(exercise, answer, cases)
    if all(outcome.value is NOT_ATTEMPTED and not outcome.error for outcome in outcomes):
        return NOTHING
    if all(outcome.value is None and not outcome.error for outcome in outcomes):
        return _not_yet("It gives None every time: is a `return` missing?" + _printed(outcomes))
    if outcomes[-1].out_of_time:
        where = _where(exercise, cases[len(outcomes) - 1])
        return _not_yet(f"It did not come back{where}: is there a loop without an end?")

    same = exercise.same or close
    expected = _outcomes(exercise, exercise.reference, cases)
    pairs = list(zip(outcomes, expected, strict=True))
    wrong = [i for i, (mine, right) in enumerate(pairs) if not mine.like(right, same)]
    wrong = [] if exercise.same is None else wrong
    broken = _broken_property(exercise, answer, cases)
    if not wrong and not broken:
        passed = Verdict("passed", _tried(cases) + _printed(outcomes))
        return (
            _changed_input(outcomes) or _read_once(outcomes) or _renamed(exercise, answer) or passed
        )
    return _mistake(exercise, cases, outcomes, same) or _not_yet(
        _explain(exercise, cases, pairs, wrong, broken, len(first)) + _printed(outcomes)
    )


def _mistake(
    exercise: Exercise,
    cases: list[tuple],
    outcomes: list[Outcome],
    same: Callable[[Any, Any], bool],
) -> Verdict | None:
    """The named wrong answer that behaves exactly like this one, if there is one."""
    for name, mutant in exercise.mutants.items():
        theirs = _outcomes(exercise, mutant.answer, cases)
        if all(mine.like(their, same) for mine, their in zip(outcomes, theirs, strict=True)):
            return _not_yet(mutant.message, name)
    return None


def _explain(
    exercise: Exercise,
    cases: list[tuple],
    pairs: list[tuple[Outcome, Outcome]],
    wrong: list[int],
    broken: str | None,
    shown: int,
) -> str:
    """The best sentence when no named mistake fits: error, pasted numbers, property, difference."""
    errors = [i for i in range(len(pairs)) if pairs[i][0].error]
    if errors:
        return _error_text(exercise, cases[errors[0]], pairs[errors[0]][0])
    if wrong and min(wrong) >= shown:
        return (
            "It is right for the cases a verdict may show, and wrong for others. "
            "Compute from the arguments; numbers that were pasted in do not travel."
        )
    other = [i for i in wrong if _sort(pairs[i][0].value) != _sort(pairs[i][1].value)]
    if broken and not other:
        return broken
    first = (other or wrong)[0]
    mine, right = pairs[first]
    return (
        f"For{_where(exercise, cases[first])[4:]} yours gives {describe(mine.value)}; "
        f"it should be {describe(right.value)}."
    )


def _sort(value: Any) -> str:
    """What kind of thing an answer is: a list where a number belongs breaks any property."""
    value = plain(value)
    return "number" if isinstance(value, int | float) else type(value).__name__


def _outcomes(exercise: Exercise, function: Any, cases: list[tuple]) -> list[Outcome]:
    """One outcome per case; stops at the first call that did not come back."""
    outcomes = []
    for case in cases:
        outcomes.append(call(function, case, exercise.observe))
        if outcomes[-1].out_of_time:
            break
    return outcomes


def _broken_property(exercise: Exercise, answer: Any, cases: list[tuple]) -> str | None:
    plainly = _plainly(answer) if callable(answer) else plain(answer)
    for claim in exercise.properties:
        for case in cases:
            outcome = call(_holds, (claim, plainly, *case))
            if outcome.error or not outcome.value:
                return claim.message
    return None


def _holds(claim: Property, answer: Any, *case: Any) -> bool:
    return bool(claim.holds(answer, *case))


def _plainly(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with lists for arrays (`==` between two is no yes or no) and iterators."""
    return lambda *case: plain(listed(answer(*case)))


def _where(exercise: Exercise, case: tuple) -> str:
    named = zip(parameters(exercise), case, strict=True)
    width = max(60, 240 // max(1, len(case)))  # a lone argument is shown nearly whole
    return " for " + ", ".join(f"{name} = {describe(value, width)}" for name, value in named)


def _error_text(exercise: Exercise, case: tuple, outcome: Outcome) -> str:
    unfinished = " There is still a `...` in it." if "ellipsis" in outcome.error_text else ""
    reason = f" ({outcome.error_text})" if outcome.error_text else ""
    return f"It stops with {outcome.error}{reason}{_where(exercise, case)}.{unfinished}"


def _changed_input(outcomes: list[Outcome]) -> Verdict | None:
    if not any(outcome.changed_input for outcome in outcomes):
        return None
    return _not_yet(
        "The values are right, but it changes the list or dict it was given; build a new one."
    )


def _read_once(outcomes: list[Outcome]) -> Verdict | None:
    """Cells below read the answer again, and would find nothing."""
    if not any(outcome.read_once for outcome in outcomes):
        return None
    return _not_yet(
        "The values are right, but they come as an iterator, which can be read only once: put them "
        "into a list (list(...), or a list that you append to instead of `yield`)."
    )


def _renamed(exercise: Exercise, answer: Callable[..., Any]) -> Verdict | None:
    """Cells below call the function by keyword: other names would pass here and break there."""
    try:
        mine = inspect.signature(answer).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
        return None
    wanted = parameters(exercise)
    open_ended = any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in mine.values())
    if open_ended or all(name in mine for name in wanted):
        return None
    names = ", ".join(wanted)
    return _not_yet(
        f"The values are right. Keep the names of the arguments, {names}: cells below use them."
    )


def _tried(cases: list[tuple]) -> str:
    return f"Tried on {len(cases)} cases."


def _printed(outcomes: list[Outcome]) -> str:
    lines = "".join(outcome.printed for outcome in outcomes).splitlines()
    return f" (It also printed {len(lines)} lines, not shown here.)" if lines else ""
