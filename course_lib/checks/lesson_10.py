"""Exercises of lesson 10: eight sick runs, a data file of one's own, an honest before-and-after."""

from __future__ import annotations

import json
import random
from typing import Any

from course_lib.checks.exercise import Exercise, Mutant, Property
from course_lib.checks.lesson_01 import line_fault

NOTHING_TRAINED = "nothing is trained on"
DEAD = "dead groups"
MASK = "mask shifted"
RATE = "learning rate too small"
STALE = "stale sampler"
HACKED = "reward hacked"
OPTIMIZER = "optimizer lost"
MERGE = "bad merge"
KINDS = (NOTHING_TRAINED, DEAD, MASK, RATE, STALE, HACKED, OPTIMIZER, MERGE)

Facts = dict[str, Any]  # see `_healthy`: what each number is
NEEDED = 6  # right ones out of eight


def _kind(facts: Facts) -> str:
    """One run's illness, from its numbers; from the plainest sign to the subtlest."""
    loss, reward, accuracy = facts["loss"], facts["reward"], facts["accuracy"]
    if facts["trained_tokens"] == 0:
        return NOTHING_TRAINED
    if facts["dead_groups"] > 0.9:
        return DEAD
    if facts["merged_minus_adapter"] > 1e-2:
        return MERGE
    if facts["jump_after_resume"] > 0.1:
        return OPTIMIZER
    if facts["ratio_off_at_step_0"] > 0.05:
        return STALE
    if reward[1] > reward[0] + 0.1 and accuracy[1] < accuracy[0]:
        return HACKED
    return MASK if loss[1] < 0.5 * loss[0] and facts["stopped"] < 0.1 else RATE


def diagnoses(runs: dict[str, Facts]) -> dict[str, str]:
    """Run name -> what is wrong with it."""
    return {name: _kind(facts) for name, facts in runs.items()}


def _enough(left: Any, right: Any) -> bool:
    if not isinstance(left, dict) or not isinstance(right, dict) or left.keys() != right.keys():
        return False
    return sum(left[name] == right[name] for name in right) >= NEEDED


def _healthy(rng: random.Random) -> Facts:
    return {
        "trained_tokens": rng.randrange(2000, 9000),  # tokens with weight or advantage, all steps
        "loss": [3.2, round(rng.uniform(0.3, 0.6), 2)],  # nats per trained token, first and last
        "reward": [0.3, round(rng.uniform(0.7, 0.9), 2)],  # what the policy is paid, first and last
        "accuracy": [0.3, round(rng.uniform(0.7, 0.9), 2)],  # held out, first and last
        "dead_groups": round(rng.uniform(0.1, 0.4), 2),  # share
        "stopped": round(
            rng.uniform(0.9, 1.0), 2
        ),  # share of completions that ended with the end token
        "ratio_off_at_step_0": 1e-6,  # largest |ratio - 1| before the first step
        "jump_after_resume": 0.0,  # nats
        "merged_minus_adapter": 1e-6,  # largest logit difference
    }


def _sick(kind: str, rng: random.Random) -> Facts:
    changes: dict[str, Facts] = {
        NOTHING_TRAINED: {
            "trained_tokens": 0,
            "loss": [0.0, 0.0],
            "accuracy": [0.3, 0.3],
            "reward": [0.3, 0.3],
        },
        DEAD: {
            "dead_groups": 1.0,
            "reward": [0.0, 0.0],
            "accuracy": [0.0, 0.0],
            "loss": [0.0, 0.0],
        },
        MASK: {"stopped": 0.02, "accuracy": [0.0, 0.0], "reward": [0.0, 0.0], "loss": [3.2, 0.4]},
        RATE: {"loss": [3.2, 3.19], "reward": [0.3, 0.31], "accuracy": [0.3, 0.3]},
        STALE: {"ratio_off_at_step_0": round(rng.uniform(0.2, 0.6), 2), "accuracy": [0.3, 0.2]},
        HACKED: {"reward": [0.3, 0.95], "accuracy": [0.4, 0.1]},
        OPTIMIZER: {"jump_after_resume": round(rng.uniform(0.2, 0.5), 2)},
        MERGE: {"merged_minus_adapter": round(rng.uniform(0.5, 4), 2)},
    }
    return _healthy(rng) | changes[kind]


def _ward(rng: random.Random) -> list[tuple]:
    return [
        (dict(zip("ABCDEFGH", (_sick(kind, rng) for kind in rng.sample(KINDS, 8)), strict=True)),)
    ]


def _mixed_up(*kinds: str, instead: str):
    def answer(runs: dict[str, Facts]) -> dict[str, str]:
        return {name: instead if kind in kinds else kind for name, kind in diagnoses(runs).items()}

    return answer


DIAGNOSE = Exercise(
    id="10.1",
    title="The clinic: name six of eight",
    kind="predict",
    answers="value",
    reference=diagnoses,
    same=_enough,
    cases=_ward,
    mutants={
        "always the rate": Mutant(
            lambda runs: dict.fromkeys(runs, RATE),
            "Not every illness is the learning rate. It explains a curve that hardly moves, and "
            "nothing else.",
        ),
        "flat is flat": Mutant(
            _mixed_up(NOTHING_TRAINED, DEAD, MASK, instead=RATE),
            "The flat curves were all given one cause. Look beside the curve: how many tokens "
            "were trained on, and how many groups were dead?",
        ),
        "believes the reward": Mutant(
            _mixed_up(HACKED, STALE, MERGE, instead="healthy"),
            "Not one of these runs is healthy. A rising reward is no proof: compare it with the "
            "accuracy, look at the ratio at step 0, and at the merged model's logits.",
        ),
        "exchanged": Mutant(
            lambda runs: {
                name: {STALE: OPTIMIZER, OPTIMIZER: STALE, MASK: HACKED, HACKED: MASK}.get(
                    kind, kind
                )
                for name, kind in diagnoses(runs).items()
            },
            "Two pairs are exchanged. A ratio that is off *before* the first step is the "
            "sampler's doing, a jump after a resume is the optimizer's; and a model that never "
            "stops was masked wrongly, not paid wrongly.",
        ),
    },
    hints=(
        "Look for the one number in each run that would be odd in a healthy run; the rest "
        "follows from it.",
        "trained_tokens, dead_groups, merged_minus_adapter, jump_after_resume and "
        "ratio_off_at_step_0 each speak for a single illness.",
        "Three are left: reward up and accuracy down; loss down and hardly a completion that "
        "stops; nothing moves.",
    ),
    stub='diagnosis = ...  # {"A": one of the eight kinds, "B": ..., up to "H"}',
)


def own_rows() -> str:
    """Three conversations of one's own, one JSON object per line."""
    rows = [("heron", "bird"), ("trout", "fish"), ("beetle", "insect")]
    return "".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is a {name}?"},
                    {"role": "assistant", "content": f"A {name} is a kind of {kind}."},
                ]
            }
        )
        + "\n"
        for name, kind in rows
    )


def _lines(text: Any) -> list[str]:
    return [line for line in str(text).splitlines() if line.strip()]


def _answers(text: Any) -> set[str]:
    return {json.loads(line)["messages"][-1]["content"] for line in _lines(text)}


TOO_FEW = "Fewer than three rows: write at least three conversations, one JSON object on each line."
UNSOUND = (
    "A row is not sound: each line is one JSON object with messages, known roles in turn, and "
    "something in every content. The validator of lesson 01 names the line and the fault."
)
TWICE = "A row occurs twice. It would simply count double; write another one."
NO_ANSWER_LAST = (
    "A row does not end with the assistant's turn, so there is nothing to train on at its end."
)
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
        Property(lambda text: len(_lines(text)) >= 3, TOO_FEW),
        Property(lambda text: all(line_fault(line) is None for line in _lines(text)), UNSOUND),
        Property(lambda text: len(set(_lines(text))) == len(_lines(text)), TWICE),
        Property(
            lambda text: all(
                json.loads(line)["messages"][-1]["role"] == "assistant" for line in _lines(text)
            ),
            NO_ANSWER_LAST,
        ),
        Property(lambda text: len(_answers(text)) > 1, PARROT),
    ),
    mutants={
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
                line.split('"A ')[0] + '"I know."}]}' for line in own_rows().splitlines()
            ),
            PARROT,
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
    cases = []
    for n in (10, 40):
        base = [1.0, 0.0] + [float(rng.random() < 0.2) for _ in range(n - 2)]
        cases.append((base, [1.0, 1.0] + [float(rng.random() < 0.8) for _ in range(n - 2)]))
    return cases


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
    },
    hints=(
        "Four numbers: two accuracies, their difference, and how many problems stand behind them.",
        "Per cent: 100 times the mean of the scores. The gain is a difference of two per cents: "
        "points.",
        "Return a dict with the keys base, tuned, gain_points and problems.",
    ),
    stub='''def before_and_after(base, tuned):
    """Scores (0.0 or 1.0) of two models on the same problems, as a dict:

    "base" and "tuned" in per cent, "gain_points" in points, "problems" counted."""
    return ...''',
)

EXERCISES = [DIAGNOSE, OWN_DATA, CERTIFICATE]
