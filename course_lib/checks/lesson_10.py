"""Exercises of lesson 10: eight sick runs, a data file of one's own, an honest before-and-after."""

from __future__ import annotations

import json
import random
from typing import Any

from course_lib.checks.exercise import Exercise, Mutant, Property
from course_lib.faults import ERROR, Fault, decode_line, row_faults
from course_lib.recordings import KINDS, Recording, ward

NEEDED = 6  # right ones out of eight
RISING = ("length_explosion", "hacked_reward", "entropy_collapse")  # rewarded for the wrong thing


def diagnoses(runs: dict[str, Recording]) -> dict[str, str]:
    """Run name -> what was really done to it."""
    return {name: run.kind for name, run in runs.items()}


def _enough(left: Any, right: Any) -> bool:
    if not isinstance(left, dict) or not isinstance(right, dict) or left.keys() != right.keys():
        return False
    return sum(left[name] == right[name] for name in right) >= NEEDED


def _right(named: dict[str, str], runs: dict[str, Recording]) -> int:
    return sum(named[name] == run.kind for name, run in runs.items())


def _instead(changes: dict[str, str]):
    """A diagnosis that takes one kind for another."""

    def answer(runs: dict[str, Recording]) -> dict[str, str]:
        return {name: changes.get(kind, kind) for name, kind in diagnoses(runs).items()}

    return answer


DIAGNOSE = Exercise(
    id="10.1",
    title="The clinic: name six of eight",
    kind="predict",
    answers="value",
    reference=diagnoses,
    same=_enough,
    cases=lambda rng: [(ward(rng.getrandbits(32)),)],
    mutants={
        "always the rate": Mutant(
            lambda runs: dict.fromkeys(runs, "tiny_rate"),
            "Not every illness is the learning rate. A rate that is too small explains a policy "
            "that does not move (its KL stays near 0 although groups live), and nothing else.",
        ),
        "flat is flat": Mutant(
            _instead(dict.fromkeys(("dead_groups", "flat_reward", "kl_runaway"), "tiny_rate")),
            "Every flat reward was given one cause. Look beside it: were there living groups to "
            "learn from, and how far did the policy move?",
        ),
        "believes the reward": Mutant(
            _instead(dict.fromkeys(RISING, "healthy")),
            "Not one of these runs is healthy. A rising reward is no proof: look at the share of "
            "right answers below the same steps.",
        ),
        "symptom for cause": Mutant(
            _instead(
                {
                    "kl_runaway": "dead_groups",
                    "entropy_collapse": "dead_groups",
                    "length_explosion": "hacked_reward",
                }
            ),
            "Those are consequences. Groups that die *later* were killed by something: look at "
            "what moved first, the KL or the entropy. And of two signs name the more special one.",
        ),
    },
    properties=(
        Property(
            lambda named, runs: named.keys() == runs.keys(),
            "Give a dict with a kind for every run, under its letter. Six right ones are enough: "
            "a guess for the rest costs nothing.",
        ),
        Property(
            lambda named, runs: set(named.values()) <= set(KINDS),
            "A kind is not spelled as in the table: small letters, words joined by `_`.",
        ),
        Property(
            lambda named, runs: _right(named, runs) > 2,
            "Fewer than three are right. Begin with the two kinds that one panel shows at the "
            "first step: the ratio, and the dead groups.",
        ),
        Property(
            lambda named, runs: _right(named, runs) >= NEEDED,
            "Three to five are right. Take the runs by pairs that look alike, and ask in which "
            "panel they differ.",
        ),
    ),
    hints=(
        "Look for the one panel in which the run leaves the grey curve first or furthest.",
        "Two kinds can be read off a single panel from the first step: the ratio, and the dead "
        "groups.",
        "Of three with a rising reward and falling right answers, one cannot stop, one always says "
        "the same, and one does neither. Of those that do not improve, compare the KL: none, "
        "some, enormous.",
    ),
    stub='diagnosis = ...  # {"A": one of the eight kinds, "B": ..., up to "H"}',
)


def own_rows() -> str:
    """Three conversations of one's own, one JSON object per line."""
    rows = [
        ("What is 20 + 14 + 33?", "It is 67."),
        ("Is the mill open?", "It is open today."),
        ("Who are you?", "I am the miller."),
    ]
    return "".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        + "\n"
        for question, answer in rows
    )


def _lines(text: Any) -> list[str]:
    return [line for line in str(text).split("\n") if line.strip()]


def _read(line: str) -> tuple[Any, list[Fault]]:
    return decode_line(line.encode("utf-8", "surrogatepass"), 1)


def _sound(line: str) -> bool:
    """Whether the loader, which the next cell calls, will take this line."""
    row, faults = _read(line)
    unread = any(found.severity == ERROR for found in faults)
    return not unread and all(found.severity != ERROR for found in row_faults(row, 1))


def _conversations(text: Any) -> list[list[dict[str, str]]]:
    return [_read(line)[0]["messages"] for line in _lines(text)]


def _answers(text: Any) -> set[str]:
    return {messages[-1]["content"] for messages in _conversations(text)}


def _different(parts: list[Any]) -> bool:
    return len({json.dumps(part, sort_keys=True) for part in parts}) == len(parts)


NOT_TEXT = "It is not a string. Join the rows to one text, with a line break after each."
TOO_FEW = "Fewer than three rows: write at least three conversations, one JSON object on each line."
UNSOUND = (
    "A row is not sound: each line is one JSON object with messages, perhaps one of the system "
    "first, then user and assistant in turn, and something in every content. The validator of "
    "lesson 01 names the line and the fault."
)
TWICE = "A row occurs twice. It would simply count double; write another one."
NO_ANSWER_LAST = (
    "A row does not end with the assistant's turn, so there is nothing to train on at its end."
)
TORN = "Two rows ask the same and answer differently: no model can learn both by heart."
PARROT = (
    "All answers are the same, so the question need not be read to give them: vary the answers."
)


OWN_DATA = Exercise(
    id="10.2",
    title="Three rows of your own",
    kind="artefact",
    answers="value",
    reference=own_rows,
    same=None,
    cases=lambda rng: [()],
    one_seed=True,
    properties=(
        Property(lambda text: isinstance(text, str), NOT_TEXT),
        Property(lambda text: len(_lines(text)) >= 3, TOO_FEW),
        Property(lambda text: all(map(_sound, _lines(text))), UNSOUND),
        Property(lambda text: _different(_conversations(text)), TWICE),
        Property(
            lambda text: all(each[-1]["role"] == "assistant" for each in _conversations(text)),
            NO_ANSWER_LAST,
        ),
        Property(lambda text: len(_answers(text)) > 1, PARROT),
        Property(lambda text: _different([each[:-1] for each in _conversations(text)]), TORN),
    ),
    mutants={
        "a list": Mutant(lambda: own_rows().splitlines(), NOT_TEXT),
        "one array": Mutant(
            lambda: json.dumps([json.loads(line) for line in own_rows().splitlines()]), TOO_FEW
        ),
        "trailing comma": Mutant(lambda: own_rows().replace("}\n", "},\n"), UNSOUND),
        "copied rows": Mutant(lambda: own_rows().splitlines(keepends=True)[0] * 3, TWICE),
        "question last": Mutant(
            lambda: own_rows().replace("]}", ', {"role": "user", "content": "And?"}]}'),
            NO_ANSWER_LAST,
        ),
        "parrot": Mutant(
            lambda: "\n".join(
                line.replace("It is 67.", "I know.")
                .replace("It is open today.", "I know.")
                .replace("I am the miller.", "I know.")
                for line in own_rows().splitlines()
            ),
            PARROT,
        ),
        "torn": Mutant(
            lambda: own_rows().replace("Is the mill open?", "Who are you?"),
            TORN,
        ),
    },
    hints=(
        "Copy the shape of a row that is sound, from the file of lesson 01, and change what is "
        "said.",
        "One object per line, no comma between the lines, no brackets around them; the assistant "
        "speaks last.",
        "Let Python do the quoting: json.dumps of a dict for each row, joined by line breaks.",
    ),
    stub='my_rows = ...  # a string: three or more lines of {"messages": [...]}',
)


def before_and_after(base: list[float], tuned: list[float]) -> dict[str, float]:
    """Two models on the same problems: accuracies in per cent, gain in points, problems."""
    problems = len(base)
    before, after = 100 * sum(base) / problems, 100 * sum(tuned) / problems
    return {"base": before, "tuned": after, "gain_points": after - before, "problems": problems}


def _scored(rng: random.Random) -> list[tuple]:
    """Shares of four answers as in the lesson, then scores of 0 and 1."""
    cases = []
    for n, scores in ((10, (0.0, 0.25, 0.5)), (40, (0.0, 0.0, 0.0, 1.0))):
        base = [1.0, 0.0] + [rng.choice(scores) for _ in range(n - 2)]
        cases.append((base, [1.0, 1.0] + [1.0 - rng.choice(scores) for _ in range(n - 2)]))
    return [*cases, cases[-1][::-1]]  # and a training that did harm


def _changed(**changes):
    def report(base: list[float], tuned: list[float]) -> dict[str, float]:
        right = before_and_after(base, tuned)
        return right | {key: change(right) for key, change in changes.items()}

    return report


CERTIFICATE = Exercise(
    id="10.3",
    title="A before-and-after that can be believed",
    kind="artefact",
    reference=before_and_after,
    cases=_scored,
    mutants={
        "relative": Mutant(
            _changed(gain_points=lambda r: 100 * (r["tuned"] / r["base"] - 1)),
            "That is the relative gain: from 1 % to 3 % it would say 200 %. Give the difference, "
            "in points.",
        ),
        "turned": Mutant(
            _changed(gain_points=lambda r: r["base"] - r["tuned"]),
            "The gain is base minus tuned: an improvement must be positive.",
        ),
        "shares": Mutant(
            _changed(
                **{key: lambda r, key=key: r[key] / 100 for key in ("base", "tuned", "gain_points")}
            ),
            "Those are shares between 0 and 1; the report promises per cent and points.",
        ),
        "counted twice": Mutant(
            _changed(problems=lambda r: 2 * r["problems"]),
            "Both models saw the same problems; count them once.",
        ),
        "never a loss": Mutant(
            _changed(gain_points=lambda r: abs(r["tuned"] - r["base"])),
            "A model that became worse is reported as better. Keep the sign of the gain.",
        ),
        "only whole ones": Mutant(
            lambda base, tuned: before_and_after(*([s // 1 for s in x] for x in (base, tuned))),
            "It counts the problems with a score of 1 and drops the others. A score may be a share "
            "of several answers: take the mean.",
        ),
        "rounded up": Mutant(
            lambda base, tuned: before_and_after(*([-(-s // 1) for s in x] for x in (base, tuned))),
            "It counts every problem whose score is not 0 as solved. A score may be a share of "
            "several answers: take the mean.",
        ),
        "gain as a share": Mutant(
            _changed(gain_points=lambda r: r["gain_points"] / 100),
            "The accuracies are in per cent, and the gain is a share. Give it in points as well.",
        ),
    },
    hints=(
        "Four numbers: two accuracies, their difference, and how many problems stand behind them.",
        "Per cent: 100 times the mean of the scores. The gain is a difference of two per cents: "
        "points.",
        "Return a dict with the keys base, tuned, gain_points and problems.",
    ),
    stub='''def before_and_after(base, tuned):
    """Scores (0 to 1) of two models on the same problems, problem by problem, as a dict:

    "base" and "tuned" in per cent, "gain_points" in points, "problems" counted."""
    return ...''',
)

EXERCISES = [DIAGNOSE, OWN_DATA, CERTIFICATE]
