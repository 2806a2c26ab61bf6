"""Exercises of lesson 01: rows with faults, the mask, the shift, the leak."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from itertools import pairwise

from course_lib.checks.exercise import Exercise, Mutant

ROLES = ("system", "user", "assistant")


def line_fault(line: str) -> str | None:
    """The first fault of one line of a conversations file, in the lesson's order; None = sound."""
    try:
        row = json.loads(line)
    except ValueError:
        return "not JSON"
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return "no messages"
    roles = [message["role"] for message in messages]
    if any(role not in ROLES for role in roles):
        return "unknown role"
    if any(not message["content"].strip() for message in messages):
        return "empty content"
    if any(first == second for first, second in pairwise(roles)):
        return "same role twice"
    return None if "assistant" in roles else "no assistant turn"


def _without(fault: str):
    """A checker that does not know one fault, and reads on."""

    def checker(line: str) -> str | None:
        found = line_fault(line)
        return None if found == fault else found

    return checker


def _empty_only_when_exactly_empty(line: str) -> str | None:
    found = line_fault(line)
    if found != "empty content":
        return found
    return found if '""' in line else None


def _needs_system(line: str) -> str | None:
    found = line_fault(line)
    return "no messages" if found is None and '"system"' not in line else found


def _lines(rng: random.Random) -> list[tuple]:
    a, b = rng.randrange(10, 99), rng.randrange(10, 99)
    ask = {"role": "user", "content": f"What is {a} + {b}?"}
    say = {"role": "assistant", "content": f"The answer is {a + b}."}
    rule = {"role": "system", "content": "Answer briefly."}
    rows = [
        [ask, say],
        [rule, ask, say],
        [ask, say, ask, say],
        [ask, {"role": "bot", "content": "Hm."}],
        [{"role": "user", "content": ""}, say],
        [{"role": "user", "content": " \n"}, say],
        [ask, ask, say],
        [rule, ask],
        [],
    ]
    lines = [json.dumps({"messages": messages}) for messages in rows]
    lines += [
        lines[0][:-1],
        lines[0][:-1] + ",}",
        json.dumps({"text": ask["content"]}),
        json.dumps([ask, say]),
    ]
    rng.shuffle(lines)
    return [(line,) for line in lines]


def _harder_lines(rng: random.Random) -> list[tuple]:
    """The lesson's lines, and some with two faults: of these the table's order names the first."""
    ask, blank = {"role": "user", "content": "Why?"}, {"role": "user", "content": ""}
    bot, say = {"role": "bot", "content": "Hm."}, {"role": "assistant", "content": "So."}
    rows = ([blank, bot], [ask, ask, bot], [ask, say, ask])
    no_objects = [("null",), (str(rng.randrange(10)),)]
    return _lines(rng) + no_objects + [(json.dumps({"messages": row}),) for row in rows]


def _message_by_message(line: str) -> str | None:
    if line_fault(line) in ("not JSON", "no messages"):
        return line_fault(line)
    before = None
    roles = [message["role"] for message in json.loads(line)["messages"]]
    for message in json.loads(line)["messages"]:
        if message["role"] not in ROLES:
            return "unknown role"
        if not message["content"].strip():
            return "empty content"
        if message["role"] == before:
            return "same role twice"
        before = message["role"]
    return None if "assistant" in roles else "no assistant turn"


def _must_end_with_assistant(line: str) -> str | None:
    found = line_fault(line)
    if found:
        return found
    return None if json.loads(line)["messages"][-1]["role"] == "assistant" else "no assistant turn"


def planted_lines(seed: int) -> list[str]:
    """Sound and faulty lines in a mixed order, for the lesson to look at."""
    return [line for (line,) in _lines(random.Random(seed))]


LINE_FAULT = Exercise(
    id="01.1",
    title="A validator for one line",
    kind="code",
    reference=line_fault,
    cases=_harder_lines,
    mutants={
        "any JSON will do": Mutant(
            lambda line: "not JSON" if line_fault(line) == "not JSON" else None,
            "It checks that the line is JSON and nothing more; a list of recipes is JSON, too. "
            "Look inside: messages, roles, contents, turns.",
        ),
        "user after user": Mutant(
            _without("same role twice"),
            "Two turns of the same role in a row pass. Templates render them without a word, and "
            "the model learns that questions may be answered with questions.",
        ),
        "no assistant": Mutant(
            _without("no assistant turn"),
            "A conversation without an assistant turn passes. It has nothing to learn from: "
            "every weight is 0.",
        ),
        "spaces are content": Mutant(
            _empty_only_when_exactly_empty,
            "A content of spaces and line breaks passes. Strip before you look whether anything "
            "is left.",
        ),
        "system required": Mutant(
            _needs_system,
            "It refuses conversations without a system message. A system message is allowed, not "
            "required.",
        ),
        "no system": Mutant(
            lambda line: "unknown role" if '"system"' in line else line_fault(line),
            "It calls `system` an unknown role. There are three: system, user and assistant.",
        ),
        "message by message": Mutant(
            _message_by_message,
            "A row may have two faults. Look for one kind in the whole row before you look for "
            "the next kind: the table's order decides, not the order of the messages.",
        ),
        "ends with the user": Mutant(
            _must_end_with_assistant,
            "It wants the assistant to speak last. A row with an assistant turn anywhere has "
            "something to learn from.",
        ),
        "sound in words": Mutant(
            lambda line: line_fault(line) or "sound",
            "For a sound line it should give None, not a word.",
        ),
        "any role": Mutant(
            _without("unknown role"),
            "A role that no template knows passes. Only system, user and assistant are known.",
        ),
    },
    hints=(
        "Six faults, one after the other, in the table's order; return at the first that you find.",
        "json.loads raises ValueError for what is not JSON. What it gives need not be a dict.",
        "For two turns in a row, compare each role with the next one: zip the roles with "
        "themselves, moved by one.",
    ),
    stub='''def line_fault(line):
    """The first of: "not JSON", "no messages", "unknown role", "empty content", "same role twice",
    "no assistant turn"; None for a sound line."""
    return ...''',
)

Token = tuple[str, str]  # (role, part): part is "header", "text" or "end"


def last_assistant_weights(tokens_T: list[Token]) -> list[float]:
    """1 for the text and the end token of the last assistant message, 0 for everything else."""
    starts = [i for i, token in enumerate(tokens_T) if token == ("assistant", "header")]
    last = starts[-1] if starts else len(tokens_T)
    trained = [role == "assistant" and part != "header" for role, part in tokens_T]
    return [float(trained[i] and i > last) for i in range(len(tokens_T))]


def _every_assistant(tokens_T: list[Token]) -> list[float]:
    return [float(role == "assistant" and part != "header") for role, part in tokens_T]


def _no_end(tokens_T: list[Token]) -> list[float]:
    right = last_assistant_weights(tokens_T)
    return [w if part != "end" else 0.0 for w, (_, part) in zip(right, tokens_T, strict=True)]


def _with_header(tokens_T: list[Token]) -> list[float]:
    right = last_assistant_weights(tokens_T)
    moved = [*right[1:], 0.0]
    header = [token == ("assistant", "header") for token in tokens_T]
    return [max(w, m if h else 0.0) for w, m, h in zip(right, moved, header, strict=True)]


def _everything(tokens_T: list[Token]) -> list[float]:
    return [1.0] * len(tokens_T)


def _early(tokens_T: list[Token]) -> list[float]:
    return [*last_assistant_weights(tokens_T)[1:], 0.0]


def _first_answer(tokens_T: list[Token]) -> list[float]:
    first = tokens_T.index(("assistant", "end"))
    return _every_assistant(tokens_T[: first + 1]) + [0.0] * (len(tokens_T) - first - 1)


def _all_after_the_header(tokens_T: list[Token]) -> list[float]:
    last = max(i for i, token in enumerate(tokens_T) if token == ("assistant", "header"))
    return [float(i > last) for i in range(len(tokens_T))]


def _only_at_the_end(tokens_T: list[Token]) -> list[float]:
    right = last_assistant_weights(tokens_T)
    return right if tokens_T[-1][0] == "assistant" else [0.0] * len(tokens_T)


def _dialogues(rng: random.Random) -> list[tuple]:
    def turn(role: str) -> list[Token]:
        return [(role, "header"), *[(role, "text")] * rng.randrange(1, 4), (role, "end")]

    orders = (
        "user assistant",
        "system user assistant",
        "user assistant user assistant",
        "user assistant user",
    )
    return [([token for role in order.split() for token in turn(role)],) for order in orders]


MASK = Exercise(
    id="01.2",
    title="Train on the last assistant message only",
    kind="code",
    reference=last_assistant_weights,
    cases=_dialogues,
    mutants={
        "every answer": Mutant(
            _every_assistant,
            "Every assistant message is trained on. Earlier ones stand in the prompt: here only "
            "the last counts.",
        ),
        "end missing": Mutant(
            _no_end,
            "The end-of-turn token has weight 0. A model trained so never learns to stop.",
        ),
        "header trained": Mutant(
            _with_header,
            "The header is trained on. It is given at sampling time, so there is nothing to "
            "learn in it.",
        ),
        "everything": Mutant(
            _everything,
            "The questions are trained on, too: the model learns to ask like a user.",
        ),
        "the first answer": Mutant(
            _first_answer,
            "The first assistant message is trained on. Here the last one counts.",
        ),
        "all that follows": Mutant(
            _all_after_the_header,
            "What follows the last assistant message is trained on, too. A question that comes "
            "after it has weight 0.",
        ),
        "only at the end": Mutant(
            _only_at_the_end,
            "It finds nothing when the conversation ends with a question. The last assistant "
            "message need not be the last message.",
        ),
        "off by one": Mutant(
            _early,
            "The mask sits one token early. Shifting comes later, with targets and weights "
            "together.",
        ),
    },
    hints=(
        "First find where the last assistant message begins; then decide token by token.",
        "Each message begins with exactly one header token. The last "
        '("assistant", "header") is the border.',
        "A token counts if it comes after that border, its role is assistant, and its part is "
        "text or end.",
    ),
    stub='''def last_assistant_weights(tokens_T):
    """One weight (0.0 or 1.0) per token; a token is (role, part).

    A part is "header", "text" or "end"."""
    return ...''',
)


def shift(tokens_T: list[int], weights_T: list[float]) -> tuple[list[int], list[int], list[float]]:
    """What goes in, what should come out, how much each target counts; all one token shorter."""
    return tokens_T[:-1], tokens_T[1:], weights_T[1:]


def _rows(rng: random.Random) -> list[tuple]:
    rows = []
    for _ in range(3):
        length = rng.randrange(4, 8)
        answer = rng.randrange(1, length)
        rows.append((rng.sample(range(100), length), [float(i >= answer) for i in range(length)]))
    words = ["I", "have", str(rng.randrange(10)), "plums", "."]
    return [*rows, (words, [0.0, 0.0, 1.0, 1.0, 1.0])]


SHIFT = Exercise(
    id="01.3",
    title="Shift by one",
    kind="code",
    reference=shift,
    cases=_rows,
    mutants={
        "weights left behind": Mutant(
            lambda t, w: (t[:-1], t[1:], w[:-1]),
            "The weights stayed with the inputs. They belong to the targets: here the first token "
            "of the answer would not be trained on.",
        ),
        "predicts itself": Mutant(
            lambda t, w: (t, t, w),
            "Inputs and targets are the same: the model learns to copy the token that it sees.",
        ),
        "weights one further": Mutant(
            lambda t, w: (t[:-1], t[1:], [*w[2:], 0.0]),
            "The weights moved one token too far: the header is trained on and the end token not.",
        ),
        "backwards": Mutant(
            lambda t, w: (t[1:], t[:-1], w[:-1]),
            "The shift goes the wrong way: the model would predict the past.",
        ),
        "turned": Mutant(
            lambda t, w: (t[1:], t[:-1], w[1:]),
            "Inputs and targets are exchanged: the model would read the next token and predict "
            "the one before.",
        ),
        "weights not cut": Mutant(
            lambda t, w: (t[:-1], t[1:], w),
            "There is one weight too many: cut the weights as you cut the targets.",
        ),
        "wraps around": Mutant(
            lambda t, w: (t, t[1:] + t[:1], w[1:] + w[:1]),
            "The last token is asked to predict the first. Nothing follows it: leave it out.",
        ),
        "targets too long": Mutant(
            lambda t, w: (t, t[1:], w[1:]),
            "The last token is still among the inputs; nothing follows it, so there is nothing "
            "to predict there.",
        ),
    },
    hints=(
        "At each position the model sees a token and predicts the next one. How many such pairs "
        "has a text of T tokens?",
        "Inputs lose their last token, targets their first. Which of the two do the weights go "
        "with?",
        "A weight says how much a *predicted* token counts, so the weights are cut exactly like "
        "the targets.",
    ),
    stub='''def shift(tokens_T, weights_T):
    """(inputs, targets, weights), each of length T - 1; a token is a number or a piece of text."""
    return ...''',
)


def leaked(train: list[str], heldout: list[str]) -> list[int]:
    """Positions of held-out questions that occur in training, whatever their case and spacing."""
    seen = {" ".join(question.lower().split()) for question in train}
    return [i for i, question in enumerate(heldout) if " ".join(question.lower().split()) in seen]


def _alike(question: str) -> str:
    return " ".join(question.lower().split())


def _leaked_if(same: Callable[[str, str], bool]) -> Callable[[list[str], list[str]], list[int]]:
    """A wrong answer: every held-out question that is the `same` as some training question."""
    return lambda train, heldout: [
        i for i, question in enumerate(heldout) if any(same(question, other) for other in train)
    ]


def _splits(rng: random.Random) -> list[tuple]:
    names = ["Mira", "Odo", "Pell", "Runa", "Tam", "Wren"]
    rng.shuffle(names)
    ask = [f"Where does {name} live?" for name in names]
    return [
        (ask[:3], [ask[3], ask[0].upper(), ask[4]]),
        (ask[:4], [ask[1].replace(" ", "  "), ask[5], ask[2]]),
        (ask[:2], ask[2:]),
        (ask[:3], ["Well: " + ask[0], ask[1] + "\n", ask[1]]),
        (["Well: " + ask[0], ask[1]], [ask[0], ask[1], ask[2], ask[1]]),
        (["Does Odo know Pell well?", ask[0], ask[0]], ["Does Pell know Odo well?", ask[0]]),
        (["What is 2 + 3?"], ["What is 2 + 4?", "what is  2 + 3?", "What is 2 - 3?"]),
    ]


LEAK = Exercise(
    id="01.4",
    title="Find the leak between the splits",
    kind="code",
    reference=leaked,
    cases=_splits,
    mutants={
        "to the letter": Mutant(
            _leaked_if(lambda q, t: q == t),
            "It compares letter by letter, so a capital or a second space hides a leak. "
            "Normalise both sides.",
        ),
        "spacing only": Mutant(
            _leaked_if(lambda q, t: q.split() == t.split()),
            "Spacing is handled, case is not: WHERE and where are the same question.",
        ),
        "contained": Mutant(
            _leaked_if(lambda q, t: _alike(t) in _alike(q)),
            "A held-out question that merely contains a training question is called a leak. "
            "Compare whole questions.",
        ),
        "contains": Mutant(
            _leaked_if(lambda q, t: _alike(q) in _alike(t)),
            "A held-out question that merely stands inside a training question is called a leak. "
            "Compare whole questions.",
        ),
        "case only": Mutant(
            _leaked_if(lambda q, t: q.lower() == t.lower()),
            "Case is handled, spacing is not: a second space or a line break hides a leak.",
        ),
        "ends only": Mutant(
            _leaked_if(lambda q, t: q.lower().strip() == t.lower().strip()),
            "strip() cuts at the two ends. A second space between two words still hides a leak.",
        ),
        "the questions": Mutant(
            lambda train, heldout: [heldout[i] for i in leaked(train, heldout)],
            "These are the questions themselves. Give their positions in heldout: 0 is the first.",
        ),
        "the first of twins": Mutant(
            lambda train, heldout: [heldout.index(heldout[i]) for i in leaked(train, heldout)],
            "A question that stands twice in heldout gets the position of its first copy twice. "
            "enumerate() gives each row its own.",
        ),
        "words in any order": Mutant(
            _leaked_if(lambda q, t: sorted(q.lower().split()) == sorted(t.lower().split())),
            "It compares the words in any order. The same words in another order may ask "
            "something else: join them again before you compare.",
        ),
        "letters only": Mutant(
            _leaked_if(
                lambda q, t: re.findall("[a-z]+", q.lower()) == re.findall("[a-z]+", t.lower())
            ),
            "It compares the letters only. Then all sums are the same question: keep digits and "
            "signs.",
        ),
        "once for each copy": Mutant(
            lambda train, heldout: [
                i
                for other in train
                for i, question in enumerate(heldout)
                if _alike(question) == _alike(other)
            ],
            "It walks through train, so a question that stands there twice is reported twice. "
            "Walk through heldout.",
        ),
        "the other side": Mutant(
            lambda train, heldout: leaked(heldout, train),
            "These are positions in the training set. Report the held-out rows: those are the "
            "ones to remove.",
        ),
    },
    hints=(
        "Two questions are the same if they agree after normalising: case and white space do not "
        "count.",
        "Build a set of normalised training questions once, then look up each held-out question "
        "in it.",
        "split() without arguments cuts at any white space; joining with one space makes all "
        "spacings alike.",
    ),
    stub='''def leaked(train, heldout):
    """A list of the positions in heldout (0 is the first) of questions that also occur in train;
    case and spacing do not count."""
    return ...''',
)

EXERCISES = [LINE_FAULT, MASK, SHIFT, LEAK]
