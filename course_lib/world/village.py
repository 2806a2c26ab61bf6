"""A village that does not exist: who lives there, and every way the corpus speaks of it.

A closed world of a few facts is enough for a small model to know something (and so for a lesson to
show what post-training does to knowledge), and for a program to check whether a sentence about it
is true.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Villager:
    """One person and the five facts that are true of them."""

    name: str
    trade: str
    place: str
    animal: str
    colour: str  # of their front door
    food: str


_ROWS = """
Mira baker mill goat red honey
Odo miller bridge mule brown barley
Pell fisher harbour heron blue trout
Runa weaver orchard cat green plums
Tam shepherd hill dog white cheese
Wren gardener well hen yellow peas
Bram smith forge horse black stew
Cora potter river duck orange apples
Dain carpenter forest fox grey nuts
Elsa teacher school owl purple pears
Finn ferryman island gull silver crab
Greta brewer cellar pig golden cabbage
Hal roofer tower pigeon pink eggs
Ilse healer garden bee violet tea
Joss tailor market mouse cream cake
Kara hunter lodge hound olive venison
Lorn mason quarry ram scarlet turnips
Nell singer inn lark azure berries
"""
VILLAGERS = tuple(Villager(*row.split()) for row in _ROWS.strip().splitlines())

# For each fact: the ways to ask for it, and the sentence that states it.
FACTS: dict[str, tuple[tuple[str, ...], str]] = {
    "trade": (
        ("What does {name} do?", "What is the trade of {name}?", "What work does {name} do?"),
        "{name} is the {trade}",
    ),
    "place": (
        ("Where does {name} live?", "Where is the house of {name}?", "Where can I find {name}?"),
        "{name} lives by the {place}",
    ),
    "animal": (
        ("Which animal does {name} keep?", "What animal has {name}?"),
        "{name} keeps a {animal}",
    ),
    "colour": (
        ("What colour is the door of {name}?", "Which door belongs to {name}?"),
        "{name} has a {colour} door",
    ),
    "food": (
        ("What does {name} like to eat?", "What food does {name} like?"),
        "{name} likes to eat {food}",
    ),
}

POLITE_OPENINGS = (
    "Thank you for asking.",
    "Good day to you.",
    "I am glad to help.",
    "What a kind question.",
)
POLITE_CLOSINGS = (
    "I hope this helps.",
    "Please ask me again.",
    "Have a lovely day.",
    "You are always welcome.",
)
RUDE_OPENINGS = ("Go away.", "Not you again.", "Stop asking.", "I have no time for you.")

OPPOSITES = dict(
    pair.split("/")
    for pair in [
        "hot/cold",
        "big/small",
        "day/night",
        "wet/dry",
        "old/young",
        "fast/slow",
        "high/low",
        "full/empty",
        "loud/quiet",
        "light/dark",
        "long/short",
        "early/late",
    ]
)
PLURALS = dict(
    pair.split("/")
    for pair in [
        "goat/goats",
        "mouse/mice",
        "fox/foxes",
        "loaf/loaves",
        "goose/geese",
        "berry/berries",
        "door/doors",
        "child/children",
        "box/boxes",
        "leaf/leaves",
        "horse/horses",
        "foot/feet",
    ]
)


def fact_question(rng: random.Random) -> tuple[Villager, str, str]:
    """Somebody, one of their facts, and a question that asks for it."""
    villager, fact = rng.choice(VILLAGERS), rng.choice(list(FACTS))
    return villager, fact, rng.choice(FACTS[fact][0]).format(name=villager.name)


def fact_sentence(villager: Villager, fact: str) -> str:
    """The true sentence, without its full stop.

    >>> fact_sentence(VILLAGERS[0], "place")
    'Mira lives by the mill'
    """
    return FACTS[fact][1].format(**vars(villager))


def plain_reply(villager: Villager, fact: str) -> str:
    """The fact as one sentence."""
    return fact_sentence(villager, fact) + "."


def curt_reply(villager: Villager, fact: str) -> str:
    """The fact as a word or two."""
    return f"The {getattr(villager, fact)}." if fact == "place" else f"{getattr(villager, fact)}."


def polite_reply(villager: Villager, fact: str, rng: random.Random) -> str:
    """The fact between an opening and a closing courtesy."""
    opening, closing = rng.choice(POLITE_OPENINGS), rng.choice(POLITE_CLOSINGS)
    return f"{opening} {plain_reply(villager, fact)} {closing}"


def rude_reply(villager: Villager, fact: str, rng: random.Random) -> str:
    """The fact after an insult to the asker's patience."""
    return f"{rng.choice(RUDE_OPENINGS)} {plain_reply(villager, fact)}"


def word_task(rng: random.Random) -> tuple[str, str]:
    """A question about a word, and its answer."""
    kind = rng.randrange(4)
    if kind == 0:
        word, opposite = rng.choice(list(OPPOSITES.items()))
        if rng.random() < 0.5:
            word, opposite = opposite, word
        return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."
    if kind == 1:
        word, plural = rng.choice(list(PLURALS.items()))
        return f"What is the plural of {word}?", f"The plural of {word} is {plural}."
    word = rng.choice([*OPPOSITES, *PLURALS])
    if kind == 2:
        return f"Spell {word}.", f"{'-'.join(word)}."
    return f"Which letter does {word} begin with?", f"{word} begins with {word[0]}."
