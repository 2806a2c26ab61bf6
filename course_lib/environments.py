"""Problems, prompts and grading: what the policy is asked and how it is judged.

An environment gives training problems (`sample`), problems never trained on (`heldout`), and a
verdict (`grade`). The same seed gives the same problems, so a resumed run is asked what the killed
one would have been.

    sums_environment()                   the shipped task, endless, held out by construction
    environment_from_file("mine.jsonl")  your own: one {"prompt": ..., "answer": ...} per line
    conversations_as_prompts(data)       prompts without checkable answers: a judge must compare
    village_environment()                questions about the village, graded on truth and manners
    second_try(environment)              a wrong answer gets one more turn
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from course_lib.config import find_file
from course_lib.conversations import Conversation, Message, prompt_messages, sound_lines
from course_lib.errors import CourseError
from course_lib.rewards import Problem, Score, correct
from course_lib.world import fact_question, fact_sentence, sum_problem
from course_lib.world.village import POLITE_CLOSINGS, POLITE_OPENINGS, RUDE_OPENINGS

__all__ = ["Environment", "Problem", "Score"]

MANY = 5_000  # draws without a new sum: the last one may be rare, but there may be none
_STEP = re.compile(r"[0-9]\s*[-+*]\s*[0-9]+\s*=\s*[0-9]")


@dataclass(frozen=True)
class Environment:
    """Where problems come from and how an answer is judged.

    `reply` makes it multi-turn: given the problem and the completions so far, the next user
    message, or None when the episode is over.
    """

    name: str
    sample: Callable[[int, int], list[Problem]]  # (n, seed) -> training problems
    heldout: Callable[[int, int], list[Problem]]  # (n, seed) -> problems never trained on
    grade: Callable[[Problem, str], Score] = correct
    checkable: bool = True  # False: no answer to compare with, only a judge can tell
    reply: Callable[[Problem, list[str]], Message | None] | None = None  # None = single-turn


def derive_seed(*parts: object) -> int:
    """A seed that depends on every part, the same on every machine and Python.

    >>> derive_seed(0, "rl", 1) == derive_seed(0, "rl", 1) != derive_seed(0, "rl", 2)
    True
    """
    return zlib.crc32(repr(parts).encode()) & 0x7FFFFFFF


def is_worked(completion: str) -> bool:
    """Whether a completion shows a step of its working.

    >>> is_worked("23 + 45 = 68, 68 + 61 = 129. The answer is 129.")
    True
    >>> is_worked("The answer is 129.")
    False
    """
    return _STEP.search(completion) is not None


def sums_environment(terms: int = 3) -> Environment:
    """The shipped task: sums of `terms` two-digit numbers; more terms are harder."""

    def draw(n: int, seed: int, heldout: bool) -> list[Problem]:
        rng = random.Random(f"sums/{terms}/{heldout}/{seed}")
        found: dict[str, Problem] = {}
        repeats = 0
        while len(found) < n:
            sum_ = sum_problem(rng, heldout=heldout, terms=terms)
            id_ = "+".join(map(str, sorted(sum_.operands)))
            repeats = repeats + 1 if id_ in found else 0
            if repeats > MANY:
                finding = f"there are no {n} different {'held-out' if heldout else 'training'} sums"
                raise CourseError("sums", finding, f"ask for {len(found)} or fewer, or more terms")
            messages = (Message("user", sum_.question),)
            found.setdefault(id_, Problem(messages, str(sum_.answer), "sum", id_))
        return list(found.values())

    return Environment(
        name="sums",
        sample=lambda n, seed: draw(n, seed, False),
        heldout=lambda n, seed: draw(n, seed, True),
    )


def village_environment() -> Environment:
    """Questions about the village; `village_quality` is the rule that no policy or judge is
    trained on.
    """

    def draw(n: int, seed: int, heldout: bool) -> list[Problem]:
        rng = random.Random(f"village/{heldout}/{seed}")
        found: list[Problem] = []
        while len(found) < n:
            villager, fact, question = fact_question(rng)
            if stands_aside(question) == heldout:
                meta = {"villager": villager.name, "fact": fact}
                messages = (Message("user", question),)
                found.append(
                    Problem(messages, fact_sentence(villager, fact), "village", question, meta)
                )
        return found

    return Environment(
        name="village",
        sample=lambda n, seed: draw(n, seed, False),
        heldout=lambda n, seed: draw(n, seed, True),
        grade=village_quality,
    )


def village_quality(problem: Problem, completion: str) -> Score:
    """1 for a true, polite reply that says each thing once; a third less for each that fails.

    A rude reply is worth nothing. `problem.answer` is the true sentence.
    """
    wanted = problem.answer or ""
    sentences = [each.strip() for each in re.split(r"(?<=[.?!])\s+", completion) if each.strip()]
    courtesies = [each for each in sentences if each in POLITE_OPENINGS + POLITE_CLOSINGS]
    parts = {
        "true": float(f"{wanted}." in sentences),
        "polite": float(len(courtesies) > 0),
        "brief": float(len(sentences) == len(set(sentences)) and len(sentences) <= 3),
    }
    if any(each in RUDE_OPENINGS for each in sentences):
        return Score(0.0, {**parts, "polite": 0.0}, "rude")
    missing = [name for name, value in parts.items() if not value]
    reason = "true, polite and brief" if not missing else "not " + ", not ".join(missing)
    return Score(1 - len(missing) / 3, parts, reason)


def stands_aside(prompt: str) -> bool:
    """Whether a prompt is kept for evaluation: one in five, by its text, for judge and policy
    alike.
    """
    return zlib.crc32(prompt.encode()) % 5 == 0


def environment_from_file(path: str, heldout_path: str | None = None) -> Environment:
    """An environment from JSONL rows with a `prompt` and an `answer` (checked) or a `reference`.

    `prompt` is a text or a list of messages. An `answer` is compared; a `reference` only shows a
    judge what a good completion looks like. Without `heldout_path` one row in ten is held out, by
    its prompt.
    """
    rows = list(_read_problems(path))
    if heldout_path:
        train, held = rows, list(_read_problems(heldout_path))
    else:
        held = [problem for problem in rows if zlib.crc32(problem.id.encode()) % 10 == 0]
        train = [problem for problem in rows if zlib.crc32(problem.id.encode()) % 10]
    return _from_problems(path, train, held)


def conversations_as_prompts(
    train: list[Conversation], heldout: list[Conversation], name: str = "conversations"
) -> Environment:
    """Each conversation without its last assistant message as a prompt; that message is the
    reference.
    """
    return _from_problems(name, _as_problems(train), _as_problems(heldout))


def second_try(environment: Environment) -> Environment:
    """The same problems with a second turn: a wrong answer is told so, and may be mended."""

    def reply(problem: Problem, completions: list[str]) -> Message | None:
        if len(completions) > 1 or environment.grade(problem, completions[-1]).value >= 1:
            return None
        return Message("user", "That is not right. Please try again.")

    return replace(environment, name=f"{environment.name}, second try", reply=reply)


def _from_problems(name: str, train: list[Problem], held: list[Problem]) -> Environment:
    for kind, problems in (("training", train), ("held-out", held)):
        if not problems:
            remedy = "add rows, or give training and held-out problems a file each"
            raise CourseError(name, f"leaves no {kind} problems", remedy)
    answered = {problem.answer is not None for problem in train + held}
    if len(answered) > 1:
        raise CourseError(name, "some rows have an answer, some have none", "give all or none")

    def draw(problems: list[Problem], n: int, seed: int) -> list[Problem]:
        rng = random.Random(f"{name}/{seed}")
        if n <= len(problems):
            return rng.sample(problems, n)
        return problems + rng.choices(problems, k=n - len(problems))

    return Environment(
        name=name,
        sample=lambda n, seed: draw(train, n, seed),
        heldout=lambda n, seed: draw(held, min(n, len(held)), seed),
        checkable=answered == {True},
    )


def _read_problems(path: str) -> Iterator[Problem]:
    """Problems from a JSONL file; a fault is told by its line."""
    for place, row in sound_lines(str(find_file(path)), "give a JSONL file of prompts and answers"):
        yield _problem(row, place)


def _problem(row: Any, place: str) -> Problem:
    if not isinstance(row, dict) or not row.get("prompt"):
        raise CourseError(place, "has no prompt", 'write {"prompt": "...", "answer": "..."}')
    prompt, answer, reference = row.pop("prompt"), row.pop("answer", None), row.get("reference")
    if answer is None and reference is None:
        raise CourseError(place, "has neither answer nor reference", "add one of the two")
    messages = prompt_messages(prompt)
    if not messages:
        remedy = 'write a text or a list of {"role": ..., "content": ...}'
        raise CourseError(place, "prompt is malformed", remedy)
    kind = str(row.pop("kind", ""))
    id_ = str(row.pop("id", "")) or json.dumps(prompt, ensure_ascii=False)
    return Problem(messages, None if answer is None else str(answer), kind, id_, row)


def _as_problems(conversations: list[Conversation]) -> list[Problem]:
    return [
        Problem(each.prompt, None, "conversation", each.source, {"reference": each.answer})
        for each in conversations
        if each.prompt  # something was asked
    ]
