"""Exercises of lesson 04: a robust grader, Bradley-Terry, a tournament, a reward repaired."""

from __future__ import annotations

import math
import random
import re

from course_lib.checks.exercise import Exercise, Mutant, Property


def read_answer(text: str) -> int | None:
    """The whole number after the last "answer is"; None if there is none."""
    marks = [match.end() for match in re.finditer("answer is ", text)]
    if not marks:
        return None
    match = re.match(r"-?\d+(?!\d|[.,]\d)", text[marks[-1] :])
    return int(match[0]) if match else None


def _read(text: str, number: str) -> int | None:
    """What another idea of a number reads right after the last "answer is "."""
    _, mark, tail = text.rpartition("answer is ")
    match = re.match(number, tail) if mark else None
    return int(match[match.lastindex or 0].replace(",", "")) if match else None


def _anywhere_behind(text: str) -> int | None:
    _, mark, tail = text.rpartition("answer is ")
    match = re.search(r"(?<![\d.,])-?\d+(?!\d|[.,]\d)", tail) if mark else None
    return int(match[0]) if match else None


def _first_stated(text: str) -> int | None:
    found = re.search(r"answer is (-?\d+)", text)
    return int(found[1]) if found else None


def _last_number(text: str) -> int | None:
    numbers = re.findall(r"-?\d+", text)
    return int(numbers[-1]) if numbers else None


def _first_number(text: str) -> int | None:
    found = re.search(r"-?\d+", text)
    return int(found[0]) if found else None


def _no_sign(text: str) -> int | None:
    right = read_answer(text)
    return right if right is None or right >= 0 else None


def _greedy_prefix(text: str) -> int | None:
    found = re.findall(r"answer is (-?\d+)", text)
    return int(found[-1]) if found else None


def _gallery(rng: random.Random) -> list[tuple]:
    a, b = rng.randrange(20, 99), rng.randrange(20, 99)
    total, wrong = a + b, a + b + rng.randrange(1, 9)
    texts = [
        f"The answer is {total}.",
        f"{a} + {b} = {total}. The answer is {total}.",
        f"The answer is {wrong}. No: the answer is {total}.",
        f"The answer is {total} because {a} + {b}.",
        f"The answer is {total} apples, and not {wrong}.",
        f"The answer is {total}, because {a} + {b}.",
        f"The answer is -{total}.",
        f"The answer is {total}.5",
        f"The answer is {total},000.",
        f"The answer is {total}. Or the answer is unknown.",
        f"The answer is unknown. {total} is my house number.",
        f"The answer is not {total}.",
        f"The answer is {wrong}.\nNo: the answer is {total}.",
        f"The answer is > {total}.",
        "The answer is 0.",
        f"The answer is {rng.randrange(1, 10)}.",
        f"The answer is {rng.randrange(10**6, 10**7)}.",
        "The answer is",
        "The answer is ",
        f"{a} + {b} = {total}.",
        f"What is {a} + {b}?",
        "The answer is nan.",
        "",
    ]
    return [(text,) for text in texts]


READ_ANSWER = Exercise(
    id="04.1",
    title="A grader that cannot be fooled",
    kind="code",
    reference=read_answer,
    cases=_gallery,
    mutants={
        "first number": Mutant(
            _first_number,
            "It takes the first number in the text, which is usually a number of the question.",
        ),
        "last number": Mutant(
            _last_number,
            "It takes the last number, marked or not. Then a copied question earns a reward, and "
            "so does a reason that follows the answer with a lucky number.",
        ),
        "first answer": Mutant(
            _first_stated,
            "It takes the first answer given. A model that corrects itself is graded on its "
            "mistake.",
        ),
        "anywhere behind": Mutant(
            _anywhere_behind,
            'It takes the first number anywhere behind the last "answer is ". In "The answer is '
            'not 129." that is no answer: the number must stand right after it.',
        ),
        "any sign between": Mutant(
            lambda text: _read(text, r"[^\w-]*(-?\d+)(?!\d|[.,]\d)"),
            'It skips signs between "answer is " and the number. "The answer is > 129." does not '
            "say 129: the number must stand right after it.",
        ),
        "runs on": Mutant(
            _greedy_prefix,
            "It reads the digits and ignores what they run on into: 129.5 and 129,000 are not "
            "129; and an "
            'earlier number counts although the last "answer is" is followed by none.',
        ),
        "half a number": Mutant(
            lambda text: _read(text, r"-?\d+(?!\d|,\d)"),
            "It reads 129.5 as 129. A point with a digit behind it belongs to the number; the "
            "full stop of a sentence does not.",
        ),
        "half of thousands": Mutant(
            lambda text: _read(text, r"-?\d+(?!\d|\.\d)"),
            "It reads 129,000 as 129: the number goes on behind the comma.",
        ),
        "any comma": Mutant(
            lambda text: _read(text, r"-?\d+(?![\d,]|\.\d)"),
            'It refuses any comma. In "The answer is 129, because ..." the comma belongs to the '
            "sentence; only a digit behind it makes the number go on.",
        ),
        "gives back digits": Mutant(
            lambda text: _read(text, r"-?\d+(?![.,]\d)"),
            "It reads 129.5 as 12: a regular expression gives digits back until its condition "
            "holds, and no point follows the 2. Refuse a further digit, too.",
        ),
        "cut short": Mutant(
            lambda text: _read(text, r"-?\d+"),
            "It reads the digits and ignores what they run on into: 129.5 and 129,000 are not "
            "129. Both should give None here.",
        ),
        "thousands read": Mutant(
            lambda text: _read(text, r"-?\d[\d,]*(?!\.\d)(?![\d,])"),
            "It reads 129,000 as a number, as the library does. This exercise is stricter: a "
            "number with a comma in it gives None.",
        ),
        "thousands and halves": Mutant(
            lambda text: _read(text, r"-?\d[\d,]*"),
            "A comma or a point with digits behind it should give None here: yours reads 129.5 "
            "as 129, or 129,000 as a number.",
        ),
        "no minus": Mutant(
            _no_sign,
            "A negative answer is not read: the minus sign belongs to the number.",
        ),
        "0 is nothing": Mutant(
            lambda text: read_answer(text) or None,
            "It gives None for an answer of 0: Python takes 0 for False. Ask whether something was "
            "found with `is not None`, or ask the match itself.",
        ),
    },
    properties=(
        Property(
            lambda f, text: not isinstance(f(text), float),
            "It should give whole numbers: 129, not 129.0.",
        ),
    ),
    hints=(
        'Find the last place where the text says "answer is ", and look only at what follows.',
        "What follows must begin with a whole number. What may come right after its last digit, "
        "and what may not?",
        "A regular expression with a negative lookahead, (?!...), refuses a comma or a point with "
        "a digit behind it. Let it refuse a further digit, too, or 129.5 is read as 12.",
    ),
    stub='''def read_answer(text):
    """The whole number right after the last "answer is " (an int, maybe negative), or None.

    None, too, if its digits go on behind a point or a comma: 129.5, 129,000."""
    return ...''',
)


def bradley_terry_loss(margins: list[float]) -> float:
    """Mean of -log sigmoid(chosen score - rejected score), safe for large margins."""
    return sum(max(-m, 0.0) + math.log1p(math.exp(-abs(m))) for m in margins) / len(margins)


def _margins(rng: random.Random) -> list[tuple]:
    usual = [[round(rng.uniform(-3, 3), 2) for _ in range(n)] for n in (1, 4, 6)]
    return [(m,) for m in (*usual, [0.0], [900.0, 1.0], [-900.0, 2.0])]


BRADLEY_TERRY = Exercise(
    id="04.2",
    title="The Bradley-Terry loss",
    kind="code",
    reference=bradley_terry_loss,
    cases=_margins,
    mutants={
        "sign": Mutant(
            lambda margins: bradley_terry_loss([-m for m in margins]),
            "The sign is turned: it pays the model for preferring the rejected answer.",
        ),
        "sum": Mutant(
            lambda margins: bradley_terry_loss(margins) * len(margins),
            "That is the sum over the pairs; the mean does not depend on how many pairs there are.",
        ),
        "no logarithm": Mutant(
            lambda margins: (
                sum(1 - 1 / (1 + math.exp(-max(min(m, 700), -700))) for m in margins) / len(margins)
            ),
            "That is the probability of being wrong. Without the logarithm a pair that is badly "
            "wrong hardly pulls.",
        ),
        "hinge": Mutant(
            lambda margins: sum(max(0.0, 1 - m) for m in margins) / len(margins),
            "That is the hinge loss: zero beyond a margin of 1, and no probability behind it.",
        ),
        "mean first": Mutant(
            lambda margins: bradley_terry_loss([sum(margins) / len(margins)]),
            "It takes the loss of the mean margin. First the loss of each pair, then the mean.",
        ),
        "in bits": Mutant(
            lambda margins: bradley_terry_loss(margins) / math.log(2),
            "That is in bits (log base 2). The loss uses the natural logarithm.",
        ),
        "only the wrong": Mutant(
            lambda margins: sum(max(-m, 0.0) for m in margins) / len(margins),
            "That pays nothing for being surer: it is 0 for every right pair. Near a margin of 0 "
            "the logarithm is missing.",
        ),
        "logarithm of 0": Mutant(
            lambda margins: math.inf if min(margins) < -104 else bradley_terry_loss(margins),
            "A large negative margin gives infinity: exp(-margin) is too large for a float, or the "
            "sigmoid is 0 and its logarithm minus infinity. Take a form that computes neither "
            "(torch: logsigmoid).",
        ),
        "overflows": Mutant(
            lambda margins: sum(math.log(1 + math.exp(-m)) for m in margins) / len(margins),
            "Right on paper, and it overflows at a margin of -900: exp of a large number. Use "
            "the form with exp(-abs(margin)).",
        ),
    },
    properties=(
        Property(
            lambda f, margins: f(margins) >= 0,
            "A loss that is minus a log-probability is never negative.",
        ),
    ),
    hints=(
        "The probability that chosen beats rejected is sigmoid(margin). The loss is minus its "
        "logarithm, averaged.",
        "At margin 0 the model is undecided: the loss must be log 2, about 0.693.",
        "For a very negative margin the loss is about -margin: split that part off (a max with "
        "0), and add log1p of something at most 1.",
    ),
    stub='''def bradley_terry_loss(margins):
    """Mean of -log(sigmoid(margin)); margin = score of chosen - score of rejected, of any size."""
    return ...''',
)


def tournament_rewards(first_wins_G_G: list[list[bool]]) -> list[float]:
    """Share of duels won, both orders asked; [i][j]: shown i first and j second, did i win?"""
    G = len(first_wins_G_G)
    rewards = []
    for i in range(G):
        others = [j for j in range(G) if j != i]
        won = sum(first_wins_G_G[i][j] for j in others) + sum(
            not first_wins_G_G[j][i] for j in others
        )
        rewards.append(won / (2 * len(others)))
    return rewards


def _one_order(wins: list[list[bool]]) -> list[float]:
    G = len(wins)
    return [sum(wins[i][j] for j in range(G) if j != i) / (G - 1) for i in range(G)]


def _tables(rng: random.Random) -> list[tuple]:
    tables = []
    for G in (2, 4, 5):
        quality = rng.sample(range(G), G)
        tables.append(
            [[quality[i] + 1.5 >= quality[j] for j in range(G)] for i in range(G)]
        )  # first place helps
    tables.append([[rng.random() < 0.5 and i != j for j in range(4)] for i in range(4)])
    return [(table,) for table in tables]


TOURNAMENT = Exercise(
    id="04.3",
    title="Rewards from a tournament",
    kind="code",
    reference=tournament_rewards,
    cases=_tables,
    mutants={
        "one order": Mutant(
            _one_order,
            "Only the duels in which an answer stood first are counted. A judge that likes the "
            "first place then decides; count both orders.",
        ),
        "plays itself": Mutant(
            lambda wins: [
                (sum(wins[i]) + sum(not row[i] for row in wins)) / (2 * len(wins))
                for i in range(len(wins))
            ],
            "Each answer also fights itself. Leave the diagonal out, above and below the line.",
        ),
        "wrong column": Mutant(
            lambda wins: [
                sum(wins[i][j] + wins[j][i] for j in range(len(wins)) if j != i)
                / (2 * len(wins) - 2)
                for i in range(len(wins))
            ],
            "In the other order [j][i] says that j won. It is a win for i when it is False.",
        ),
        "shown second": Mutant(
            lambda wins: [
                sum(not wins[j][i] for j in range(len(wins)) if j != i) / (len(wins) - 1)
                for i in range(len(wins))
            ],
            "Only the duels in which an answer stood second are counted. Count both orders.",
        ),
        "duels lost": Mutant(
            lambda wins: [1 - reward for reward in tournament_rewards(wins)],
            "That is the share of duels lost: the best answer gets the least.",
        ),
        "divided by once": Mutant(
            lambda wins: [2 * reward for reward in tournament_rewards(wins)],
            "Each answer meets each other one twice: divide by twice the number of others.",
        ),
        "a count": Mutant(
            lambda wins: [r * 2 * (len(wins) - 1) for r in tournament_rewards(wins)],
            "That is the number of wins. Divide by the number of duels, so that rewards lie "
            "between 0 and 1.",
        ),
    },
    properties=(
        Property(
            lambda f, wins: abs(sum(f(wins)) - len(wins) / 2) < 1e-6,
            "Every duel has one winner, so the rewards of a group must add up to half its size.",
        ),
    ),
    hints=(
        "Answer i meets each other answer twice: once shown first, once shown second.",
        "Shown first, it wins if [i][j] is true. Shown second, look at [j][i]: what must that be?",
        "Two sums over the others, divided by twice the number of others.",
    ),
    stub='''def tournament_rewards(first_wins_G_G):
    """One reward per answer, 0 to 1; [i][j] is True if i, shown before j, was preferred."""
    return ...''',
)


def repaired_reward(is_correct: bool, polish: float) -> float:
    """1 for correct, and up to 0.2 more for polish, only if correct; nothing for a wrong answer."""
    return 1.0 + 0.2 * min(max(polish, 0.0), 1.0) if is_correct else 0.0


REPAIR = Exercise(
    id="04.4",
    title="Repair the reward",
    kind="find the bug",
    reference=repaired_reward,
    cases=lambda rng: [
        (right, polish)
        for right in (True, False)
        for polish in (0.0, round(rng.uniform(0.1, 0.9), 2), 1.0, 7.5, -2.0)
    ],
    mutants={
        "paid for polish alone": Mutant(
            lambda right, polish: float(right) + 0.2 * min(max(polish, 0.0), 1.0),
            "A wrong answer still earns its polish. That is the way the policy will take, "
            "because polish is easier than arithmetic: give it nothing unless the answer is "
            "right.",
        ),
        "unbounded": Mutant(
            lambda right, polish: 1.0 + 0.2 * polish if right else 0.0,
            'Polish has no ceiling (or floor): seven times "thank you" is worth more than being '
            "right. Bound it to 0 .. 1 first.",
        ),
        "no floor": Mutant(
            lambda right, polish: 1.0 + 0.2 * min(polish, 1.0) if right else 0.0,
            "Polish has no floor: a right answer may be paid less than 1. It counts at least 0.",
        ),
        "no ceiling": Mutant(
            lambda right, polish: 1.0 + 0.2 * max(polish, 0.0) if right else 0.0,
            'Polish has no ceiling: seven times "thank you" is worth more than being right. It '
            "counts at most 1.",
        ),
        "cut at 0.2": Mutant(
            lambda right, polish: 1.0 + max(min(polish, 0.2), 0.0) if right else 0.0,
            "It cuts polish off at 0.2, so that a little earns as much as a lot. Bound it to "
            "0 .. 1, then take 0.2 of it.",
        ),
        "all of the polish": Mutant(
            lambda right, polish: 1.0 + min(max(polish, 0.0), 1.0) if right else 0.0,
            "The factor 0.2 is missing: polish is worth as much as being right.",
        ),
        "a product": Mutant(
            lambda right, polish: float(right) * min(max(polish, 0.0), 1.0),
            "A right answer without polish earns nothing, so there is no signal until the model "
            "is polite by chance.",
        ),
        "polish rules": Mutant(
            lambda right, polish: 0.2 * float(right) + min(max(polish, 0.0), 1.0) if right else 0.0,
            "The weights are exchanged: polish is worth five times the right answer.",
        ),
        "no polish": Mutant(
            lambda right, polish: float(right),
            "It cannot be gamed, and it no longer asks for polish at all. Keep 0.2 of it, behind "
            "the right answer.",
        ),
    },
    hints=(
        "What is the cheapest way to earn under the broken reward? That way must pay nothing.",
        "Polish may only be counted after correctness has been established, and only within "
        "bounds.",
        "min and max bound a number; a conditional expression gives 0 to a wrong answer.",
    ),
    stub='''def repaired_reward(is_correct, polish):
    """0 if wrong; if correct 1 plus 0.2 times the polish, which counts at least 0 and at most 1."""
    return ...''',
)

EXERCISES = [READ_ANSWER, BRADLEY_TERRY, TOURNAMENT, REPAIR]
