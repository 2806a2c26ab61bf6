"""What people hand to post-training: conversations to imitate, and pairs of replies of which one is
preferred.

The conversations show the chat format. Most of their sums are answered directly and some are worked
out, as people do who write examples in a hurry; nothing in them says which of the two pays. Replies
about the village are curt, plain or polite. `heldout=True` takes its sums from the held-out side
and the rest from another seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from course_lib.world import sums, village

WORKED_SHARE = 0.3  # of the sums that the conversations answer
SYSTEM_LINES = (
    "You help the people of the village.",
    "Answer the question.",
    "You are a friendly helper.",
)


def conversations(
    seed: int, count: int, *, heldout: bool = False
) -> Iterator[list[dict[str, str]]]:
    """`count` different conversations, each a list of messages."""
    rng = random.Random(f"conversations-{seed}-{heldout}")
    seen: set[str] = set()
    while len(seen) < count:
        messages = _conversation(rng, heldout)
        key = repr(messages)
        if key not in seen:
            seen.add(key)
            yield messages


def preference_pairs(seed: int, count: int) -> Iterator[dict[str, str]]:
    """`count` different rows of prompt, chosen, rejected and why."""
    rng = random.Random(f"preferences-{seed}")
    seen: set[tuple[str, str, str]] = set()
    while len(seen) < count:
        row = _pair(rng)
        key = (row["prompt"], row["chosen"], row["rejected"])
        if row["chosen"] != row["rejected"] and key not in seen:
            seen.add(key)
            yield row


def _conversation(rng: random.Random, heldout: bool) -> list[dict[str, str]]:
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_LINES)})
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        question, answer = _exchange(rng, heldout)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _exchange(rng: random.Random, heldout: bool) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.60:
        problem = sums.sum_problem(rng, heldout=heldout)
        answer = sums.worked_answer if rng.random() < WORKED_SHARE else sums.direct_answer
        return problem.question, answer(problem.operands)
    if draw < 0.72:
        return village.word_task(rng)
    villager, fact, question = village.fact_question(rng)
    manner = rng.choices(("plain", "polite", "curt"), (0.5, 0.25, 0.25))[0]
    return question, _reply(rng, villager, fact, manner)


def _reply(rng: random.Random, villager: village.Villager, fact: str, manner: str) -> str:
    if manner == "polite":
        return village.polite_reply(villager, fact, rng)
    if manner == "rude":
        return village.rude_reply(villager, fact, rng)
    if manner == "curt":
        return village.curt_reply(villager, fact)
    return village.plain_reply(villager, fact)


def _pair(rng: random.Random) -> dict[str, str]:
    """A better and a worse reply to one question; the reason is one of five."""
    villager, fact, question = village.fact_question(rng)
    polite = village.polite_reply(villager, fact, rng)
    other = rng.choice(
        [v for v in village.VILLAGERS if getattr(v, fact) != getattr(villager, fact)]
    )
    wrong = village.Villager(**{**vars(villager), fact: getattr(other, fact)})
    opening = polite[: polite.index(villager.name)]
    rambling = (
        f"{polite} {rng.choice(village.POLITE_CLOSINGS)} {rng.choice(village.POLITE_CLOSINGS)}"
    )
    plain = village.plain_reply(villager, fact)
    options = (
        (polite, village.curt_reply(villager, fact), "a whole, polite sentence instead of a word"),
        (polite, village.rude_reply(villager, fact, rng), "polite instead of rude"),
        (polite, plain, "polite instead of plain"),
        (
            rng.choice((polite, plain)),
            village.polite_reply(wrong, fact, rng),
            "true instead of false",
        ),
        (polite, rambling, "says it once and stops"),
        (polite, opening.strip(), "answers the question"),
        (plain, village.rude_reply(villager, fact, rng), "civil instead of rude"),
    )
    chosen, rejected, why = rng.choice(options)
    return {"prompt": question, "chosen": chosen, "rejected": rejected, "why": why}
