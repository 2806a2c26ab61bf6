"""The pretraining corpus: documents about sums and about the village, never a chat that answers a
question.

Sums stand in it directly and worked out, in exercise-book form. The chat tokens occur too, every
one of them, but only as the marks of a play script in which nobody answers anybody: a base model
knows that turns exist, and has never seen one used to ask for something.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from course_lib.world import sums, village

END = "<|end|>"

_WEATHER = ("rain", "sun", "wind", "snow", "fog", "frost")
_TIMES = (
    "In the morning",
    "At noon",
    "In the evening",
    "At night",
    "On market day",
    "In winter",
    "In spring",
)
_SAYINGS = (
    "The {weather} is back over the {place}.",
    "I saw the {animal} of {name} near the {place}.",
    "Soon we will have {food} again.",
    "{name} went to the {place} with {friend}.",
    "The {colour} door is open today.",
    "We should mend the fence by the {place}.",
    "Listen, the {animal} is calling.",
    "My feet are tired from the {place}.",
)
_DEEDS = (
    "{name} the {trade} walked to the {place} of {friend}",
    "{name} fed the {animal} and sat by the {place}",
    "{name} gave some {food} to {friend}",
    "{name} and {friend} talked about the {weather}",
    "{name} painted the {colour} door once more",
    "{name} looked for the {animal} until the {weather} came",
    "{friend} asked {name} for a little {food}",
)


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents, each ending in `<|end|>`."""
    rng = random.Random(seed)
    makers = (_running_sums, _long_sums, _questions, _prose, _script, _portrait)
    weights = (0.20, 0.44, 0.13, 0.08, 0.09, 0.06)
    while True:
        yield rng.choices(makers, weights)[0](rng) + END


def _exercise(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"


def _running_sums(rng: random.Random) -> str:
    """Sums of two numbers, the first of which may itself be a running total."""
    lines = []
    for _ in range(rng.randint(2, 8)):
        left = rng.randint(10, 99) if rng.random() < 0.5 else rng.randint(20, 198)
        right = rng.randint(10, 99)
        if rng.random() < 0.7:
            lines.append(f"{left} + {right} = {left + right}")
        else:
            form = rng.choice(sums.QUESTION_FORMS)
            question = sums.ask((left, right), form, rng)
            lines.append(_exercise(question, sums.direct_answer((left, right))))
    return "\n".join(lines)


def _long_sums(rng: random.Random) -> str:
    """Sums of three numbers in one style a document: directly, or worked out."""
    answer = sums.direct_answer if rng.random() < 0.5 else sums.worked_answer
    problems = [sums.sum_problem(rng) for _ in range(rng.randint(1, 5))]
    return "\n".join(_exercise(p.question, answer(p.operands)) for p in problems)


def _questions(rng: random.Random) -> str:
    """Questions about the village and about words, answered curtly, plainly, politely or rudely."""
    manner = rng.randrange(4)
    lines = []
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.3:
            lines.append(_exercise(*village.word_task(rng)))
            continue
        villager, fact, question = village.fact_question(rng)
        replies = (
            village.curt_reply(villager, fact),
            village.plain_reply(villager, fact),
            village.polite_reply(villager, fact, rng),
            village.rude_reply(villager, fact, rng),
        )
        lines.append(_exercise(question, replies[manner]))
    return "\n".join(lines)


def _fill(template: str, rng: random.Random) -> str:
    villager = rng.choice(village.VILLAGERS)
    friend = rng.choice([other for other in village.VILLAGERS if other is not villager])
    return template.format(**vars(villager), friend=friend.name, weather=rng.choice(_WEATHER))


def _prose(rng: random.Random) -> str:
    """A few sentences of village life."""
    sentences = [
        f"{rng.choice(_TIMES)}, {_fill(rng.choice(_DEEDS), rng)}." for _ in range(rng.randint(2, 6))
    ]
    return " ".join(sentences)


def _script(rng: random.Random) -> str:
    """A play script: turns that follow one another without answering."""
    parts = []
    if rng.random() < 0.4:
        parts.append(f"<|system|>A scene by the {rng.choice(village.VILLAGERS).place}.{END}")
    roles = ("<|user|>", "<|assistant|>")
    first = rng.randrange(2)
    for turn in range(rng.randint(2, 6)):
        sayings = [_fill(rng.choice(_SAYINGS), rng) for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.15:
            courtesies = village.POLITE_OPENINGS + village.POLITE_CLOSINGS
            sayings.insert(0, rng.choice(courtesies))
        parts.append(roles[(turn + first) % 2] + " ".join(sayings))
    return END.join(parts)


def _portrait(rng: random.Random) -> str:
    """All that is known of one person."""
    villager = rng.choice(village.VILLAGERS)
    facts = list(village.FACTS)
    rng.shuffle(facts)
    return " ".join(village.plain_reply(villager, fact) for fact in facts)
