"""What a learner calls: `check`, `hint`, `progress`. None of them ever raises over an answer."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import Any

from course_lib.checks.exercise import Exercise
from course_lib.checks.judge import Verdict, judge, parameters
from course_lib.checks.record import Entry, read_progress, write_entry
from course_lib.checks.registry import LESSONS, exercises, find

_handed_out: dict[str, Any] = {}  # by exercise: the reference solution that a learner went on with


def check(id: str, answer: Any, **given: Any) -> Any:
    """Print a verdict on `answer`; return it if it passed, else the reference, and say so.

    `given` are the facts a predicted or measured value is judged against. What was handed out is
    not judged when the cell is run again: it is nobody's answer.
    """
    exercise = find(id)
    if exercise is None:
        _say(f"There is no exercise {id}. {_known(id)}")
        return answer
    missing = (
        [name for name in parameters(exercise) if name not in given]
        if exercise.answers == "value"
        else []
    )
    if missing:
        _say(
            f"{id} needs {', '.join(missing)} as well: check({id!r}, {exercise.name}, "
            f"{missing[0]}=...)."
        )
        return answer
    if id in _handed_out and answer is _handed_out[id]:
        _say(
            f"{id} {exercise.title}: not judged. This is the reference solution, which the last "
            "check went on with. Run your own cell above again, then this one."
        )
        return answer
    verdict = judge(exercise, answer, given)
    _remember(id, verdict)
    _say(sentence(exercise, verdict))
    if verdict.status == "passed":
        return answer
    _handed_out[id] = (
        exercise.reference
        if exercise.answers == "function"
        else exercise.reference(**{name: given[name] for name in parameters(exercise)})
    )
    return _handed_out[id]


def hint(id: str) -> None:
    """Print the next of the exercise's three hints; each call gives one more."""
    exercise = find(id)
    if exercise is None:
        _say(f"There is no exercise {id}. {_known(id)}")
        return
    entry = read_progress().get(id, Entry())
    count = min(entry.hints + 1, len(exercise.hints))
    write_entry(id, replace(entry, hints=count))
    _say(f"{id} hint {count} of {len(exercise.hints)}: {exercise.hints[count - 1]}")


def progress() -> None:
    """Print what is solved, lesson by lesson. The record is a file on this machine."""
    entries = read_progress()
    total = solved_in_all = 0
    for lesson, title in LESSONS.items():
        ids = [exercise.id for exercise in exercises(lesson)]
        solved = [id for id in ids if entries.get(id, Entry()).solved]
        total, solved_in_all = total + len(ids), solved_in_all + len(solved)
        marks = "  ".join(f"{id} {_state(entries.get(id, Entry()))}" for id in ids)
        print(f"{lesson} {title:<24} {len(solved)} of {len(ids)}   {marks}".rstrip())
    print(f"In all {solved_in_all} of {total} solved.")


def sentence(exercise: Exercise, verdict: Verdict) -> str:
    """The verdict as a learner reads it."""
    head = f"{exercise.id} {exercise.title}: {verdict.status}."
    going_on = "The cells below go on with the reference solution."
    if verdict.status == "passed":
        return f"{head} {verdict.text}".strip()
    if verdict.status == "not attempted":
        return (
            f"{head} Replace the `...` in {exercise.name}; hint({exercise.id!r}) helps. {going_on}"
        )
    return f"{head} {verdict.text} {going_on}"


def _remember(id: str, verdict: Verdict) -> None:
    if verdict.status == "not attempted":
        return
    entry = read_progress().get(id, Entry())
    solved = entry.solved or verdict.status == "passed"
    write_entry(id, replace(entry, solved=solved, tries=entry.tries + 1))


def _state(entry: Entry) -> str:
    if entry.solved:
        return "solved"
    return f"tried {entry.tries}x" if entry.tries else "open"


def _known(id: str) -> str:
    if isinstance(id, int | float):
        return f'Write the number in quotes, with its zero: "{id:04.1f}".'
    ids = [exercise.id for exercise in exercises(str(id)[:2])]
    return (
        f"This lesson has {', '.join(ids)}."
        if ids
        else f"Lessons are {min(LESSONS)} to {max(LESSONS)}."
    )


def _say(text: str) -> None:
    print(textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False))
