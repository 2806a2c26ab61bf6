"""Sums of two-digit numbers: the task that post-training improves, with answers that can be
checked.

Three numbers are hard to add in one go for a small model and easy to add in two steps, which is why
working a sum out pays. Which sums are held out is decided by the numbers alone (`is_heldout`),
whatever their order or wording, so the corpus, the conversations, the RL prompts and the evaluation
can never disagree about it.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

SMALLEST, LARGEST = 10, 99  # operands, both included

QUESTION_FORMS = (
    "What is {sum}?",
    "{sum} = ?",
    "Add {list}.",
    "Find the sum of {list}.",
    "How much is {plus}?",
    "Please work out {sum}.",
    "Can you add {list}?",
    "{name} picks {list} {things}. How many {things} is that?",
)
_NAMES = ("Mira", "Odo", "Pell", "Runa", "Tam", "Wren")
_THINGS = ("apples", "plums", "eggs", "pears", "nuts")


@dataclass(frozen=True)
class SumProblem:
    """A question in words, its numbers in the order asked, and the right answer."""

    operands: tuple[int, ...]
    question: str
    answer: int


def is_heldout(operands: tuple[int, ...] | list[int]) -> bool:
    """Whether a sum is kept for evaluation: one in ten, the same for every order and wording.

    >>> is_heldout((23, 45, 61)) == is_heldout((61, 23, 45))
    True
    """
    key = "+".join(str(number) for number in sorted(operands))
    return zlib.crc32(key.encode()) % 10 == 0


def draw_operands(rng: random.Random, *, heldout: bool, terms: int = 3) -> tuple[int, ...]:
    """`terms` two-digit numbers from the held-out or the training side."""
    while True:
        operands = tuple(rng.randint(SMALLEST, LARGEST) for _ in range(terms))
        if is_heldout(operands) == heldout:
            return operands


def sum_problem(rng: random.Random, *, heldout: bool = False, terms: int = 3) -> SumProblem:
    """A sum to ask, in a random one of the `QUESTION_FORMS`."""
    operands = draw_operands(rng, heldout=heldout, terms=terms)
    question = ask(operands, rng.choice(QUESTION_FORMS), rng)
    return SumProblem(operands, question, sum(operands))


def ask(operands: tuple[int, ...], form: str, rng: random.Random) -> str:
    """The question in one of the wordings."""
    words = [str(number) for number in operands]
    return form.format(
        sum=" + ".join(words),
        plus=" plus ".join(words),
        list=", ".join(words[:-1]) + " and " + words[-1],
        name=rng.choice(_NAMES),
        things=rng.choice(_THINGS),
    )


def direct_answer(operands: tuple[int, ...]) -> str:
    """The answer alone.

    >>> direct_answer((23, 45, 61))
    'The answer is 129.'
    """
    return f"The answer is {sum(operands)}."


def worked_answer(operands: tuple[int, ...]) -> str:
    """The answer after its running sums.

    >>> worked_answer((23, 45, 61))
    '23 + 45 = 68, 68 + 61 = 129. The answer is 129.'
    """
    total, steps = operands[0], []
    for number in operands[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    return f"{', '.join(steps)}. {direct_answer(operands)}"
