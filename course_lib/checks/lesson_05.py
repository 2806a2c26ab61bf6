"""Exercises of lesson 05: centred advantages, the first loss, a group that is none, dead groups."""

from __future__ import annotations

import math
import random
import statistics

from course_lib.checks.exercise import Exercise, Mutant, Property

Groups = list[list[float]]


def group_advantages(rewards_P_G: Groups) -> Groups:
    """Each reward minus the mean of its own group (Liu et al. 2025, Dr. GRPO)."""
    return [
        [reward - sum(rewards_G) / len(rewards_G) for reward in rewards_G]
        for rewards_G in rewards_P_G
    ]


def _batch_mean(rewards_P_G: Groups) -> Groups:
    everything = [reward for rewards_G in rewards_P_G for reward in rewards_G]
    mean = sum(everything) / len(everything)
    return [[reward - mean for reward in rewards_G] for rewards_G in rewards_P_G]


def _divided_by(spread, epsilon: float = 1e-6):
    def advantages(rewards_P_G: Groups) -> Groups:
        centred = group_advantages(rewards_P_G)
        floors = [spread(rewards_G) + epsilon for rewards_G in rewards_P_G]
        return [
            [advantage / floor if floor else math.nan for advantage in advantages_G]
            for advantages_G, floor in zip(centred, floors, strict=True)
        ]

    return advantages


def _column_means(rewards_P_G: Groups) -> Groups:
    means_G = [sum(column) / len(column) for column in zip(*rewards_P_G, strict=True)]
    return [[r - mean for r, mean in zip(row, means_G, strict=True)] for row in rewards_P_G]


def _rewards(rng: random.Random) -> list[tuple]:
    cases = []
    for P, G in ((1, 4), (2, 4), (3, 8)):
        chances = [rng.uniform(0.2, 0.8) for _ in range(P)]
        rows = [[float(rng.random() < chance) for _ in range(G - 1)] for chance in chances]
        cases.append(([[*row, round(rng.random(), 2)] for row in rows],))
    return [*cases, ([[1.0] * 4, [0.0] * 4],)]


ADVANTAGES = Exercise(
    id="05.1",
    title="Centred advantages",
    kind="code",
    reference=group_advantages,
    cases=_rewards,
    mutants={
        "not centred": Mutant(
            lambda rewards_P_G: [list(rewards_G) for rewards_G in rewards_P_G],
            "These are the rewards themselves. With rewards of 0 and 1 every right answer is "
            "pushed up and no wrong one is pushed down; subtract the group's mean.",
        ),
        "batch mean": Mutant(
            _batch_mean,
            "It subtracts the mean of the whole batch. Then all answers to an easy question look "
            "good and all answers to a hard one look bad: each group has a mean of its own.",
        ),
        "divided by std": Mutant(
            _divided_by(statistics.pstdev),
            "It also divides by the group's standard deviation (the original GRPO). Groups that "
            "nearly all agree then weigh the most; here we only centre.",
        ),
        "divided by nothing": Mutant(
            _divided_by(statistics.pstdev, epsilon=0.0),
            "It also divides by the group's standard deviation, which is 0 where all rewards are "
            "equal: such a group gets nan. Here we only centre.",
        ),
        "divided by sample std": Mutant(
            _divided_by(statistics.stdev),
            "It also divides by the sample standard deviation (with G - 1). Here we only centre.",
        ),
        "divided by sample nothing": Mutant(
            _divided_by(statistics.stdev, epsilon=0.0),
            "It also divides by the sample standard deviation (torch's std), and gives nan where "
            "that is 0, in a group of equal rewards. Here we only centre.",
        ),
        "sign": Mutant(
            lambda rewards_P_G: [[-a for a in row] for row in group_advantages(rewards_P_G)],
            "The sign is turned: better than the group's mean must be positive.",
        ),
        "leave one out": Mutant(
            lambda rewards_P_G: [
                [r - (sum(row) - r) / (len(row) - 1) for r in row] for row in rewards_P_G
            ],
            "It compares with the mean of the others (leave one out), which the library knows, "
            "too. Here the mean is that of the whole group, the answer itself included.",
        ),
        "fixed middle": Mutant(
            lambda rewards_P_G: [[r - 0.5 for r in row] for row in rewards_P_G],
            "It subtracts 0.5 from every reward. The measure is the group's own mean.",
        ),
        "mean of a column": Mutant(
            _column_means,
            "It takes the mean over the problems, for each place in the group. The answers to "
            "compare stand in one row: one mean per row (axis=1 in numpy).",
        ),
        "flat": Mutant(
            lambda rewards_P_G: [a for row in group_advantages(rewards_P_G) for a in row],
            "The numbers are right, but they stand in one flat list. Give a list for each group, "
            "of the same shape as the rewards.",
        ),
        "the means": Mutant(
            lambda rewards_P_G: [sum(row) / len(row) for row in rewards_P_G],
            "Those are the means of the groups. Subtract each from the rewards of its group.",
        ),
        "above the best": Mutant(
            lambda rewards_P_G: [[r - max(row) for r in row] for row in rewards_P_G],
            "It subtracts the group's best reward, so nothing is ever encouraged. Subtract the "
            "mean.",
        ),
    },
    properties=(
        Property(
            lambda f, rewards_P_G: all(abs(sum(row)) < 1e-6 for row in f(rewards_P_G)),
            "The advantages of each group must add up to zero: that is what centring means.",
        ),
    ),
    hints=(
        '"Better than what?" Here it means: better than the other answers to the same question.',
        "Work on one group at a time: its mean, then each reward minus that mean.",
        "A list comprehension inside a list comprehension: the outer one over groups, the inner "
        "one over rewards.",
    ),
    stub='''def group_advantages(rewards_P_G):
    """rewards_P_G: P groups (one per problem) of G rewards; gives advantages of the same shape."""
    return ...''',
)


def group_requests(problems: list[str], group_size: int) -> list[list[str]]:
    """What to sample: for each problem a group of `group_size` times that same problem."""
    return [[problem] * group_size for problem in problems]


def _slices(problems: list[str], group_size: int) -> list[list[str]]:
    count = len(problems)
    return [[problems[(i + k) % count] for k in range(group_size)] for i in range(count)]


GROUPS = Exercise(
    id="05.3",
    title="A group that is no group",
    kind="find the bug",
    reference=group_requests,
    cases=lambda rng: [
        ([f"What is {rng.randrange(10, 99)} + {i}?" for i in range(P)], G)
        for P, G in ((2, 4), (3, 2), (4, 3))
    ],
    mutants={
        "different problems": Mutant(
            _slices,
            'A group holds different problems. Then "better than the mean" says which problem was '
            "easier, and nothing about the answers.",
        ),
        "turned": Mutant(
            lambda problems, G: [list(problems) for _ in range(G)],
            "Rows and columns are exchanged: there are G groups of P problems instead of P "
            "groups of G.",
        ),
        "flat": Mutant(
            lambda problems, G: [problem for problem in problems for _ in range(G)],
            "All requests stand in one flat list, so nobody can tell where a group ends.",
        ),
        "one problem for all": Mutant(
            lambda problems, G: [[problems[0]] * G for _ in problems],
            "Every group asks the first problem. Group p asks problems[p].",
        ),
        "said, not done": Mutant(
            lambda problems, G: [(problem, G) for problem in problems],
            "Each group says how often to ask. Write the problem out `group_size` times.",
        ),
        "cut up": Mutant(
            lambda problems, G: [problems[i : i + G] for i in range(0, len(problems), G)],
            "It cuts the list of problems into pieces. A group is one problem, asked "
            "`group_size` times.",
        ),
        "one sample": Mutant(
            lambda problems, G: [[problem] for problem in problems],
            "Each group has a single answer. Its mean is itself and its advantage is always 0.",
        ),
    },
    hints=(
        "Print the first group of the broken version. What do its members have in common?",
        "One group belongs to one problem, and is asked that problem group_size times.",
        "The outer list runs over the problems; the inner list repeats one of them.",
    ),
    stub='''def group_requests(problems, group_size):
    """A list of groups: group p is what to ask to get `group_size` answers to problems[p]."""
    return ...''',
)


def first_loss(advantages_G: list[float], lengths_G: list[int]) -> float:
    """importance_sampling's loss:sum while every ratio is 1: minus the sum of A x tokens."""
    return -sum(a * length for a, length in zip(advantages_G, lengths_G, strict=True))


def _first_groups(rng: random.Random) -> list[tuple]:
    cases = []
    for _ in range(4):
        rewards = rng.sample([0.0, 0.0, 1.0, 1.0, 0.0, 0.0], 6)
        lengths = [rng.randrange(4, 12) for _ in rewards]
        cases.append((group_advantages([rewards])[0], lengths))
    raw = [float(advantage > 0) for advantage in cases[-1][0]]
    return [*cases[:-1], (raw, cases[-1][1])]  # not centred: one token more or less is then seen


FIRST_LOSS = Exercise(
    id="05.2",
    title="Predict the first loss",
    kind="predict",
    reference=first_loss,
    cases=_first_groups,
    mutants={
        "always zero": Mutant(
            lambda advantages_G, lengths_G: 0.0,
            "It would be zero if all completions had the same length. The loss is summed over "
            "tokens, so a long completion counts its advantage many times.",
        ),
        "each answer once": Mutant(
            lambda advantages_G, lengths_G: -sum(advantages_G),
            "Each answer counts its advantage once. The loss is summed over tokens: an answer "
            "counts it once for each of its tokens.",
        ),
        "per completion": Mutant(
            lambda a, n: -sum(x * m for x, m in zip(a, n, strict=True)) / len(n),
            "That is the mean over the completions. The SDK sums over tokens and over data, and "
            "averages nothing.",
        ),
        "per token": Mutant(
            lambda a, n: -sum(x * m for x, m in zip(a, n, strict=True)) / sum(n),
            "That is the mean over the tokens. The SDK sums over tokens and over data, and "
            "averages nothing.",
        ),
        "for each answer": Mutant(
            lambda a, n: [-x * m for x, m in zip(a, n, strict=True)],
            "These are the parts, one for each answer. The SDK sums them: give the sum.",
        ),
        "sign": Mutant(
            lambda a, n: sum(x * m for x, m in zip(a, n, strict=True)),
            "The sign is turned: the loss is minus ratio times advantage.",
        ),
    },
    hints=(
        "Before the first step the sampler and the trainer are the same model. What is the ratio "
        "of each token?",
        "With every ratio at 1, a token's loss is minus its advantage; every token of a "
        "completion has the same one.",
        "So each completion contributes its advantage once per token. Sum that up, and mind the "
        "sign.",
    ),
    stub='''def first_loss(advantages_G, lengths_G):
    """loss:sum of importance_sampling before the first step; lengths_G in completion tokens."""
    return ...''',
)


def dead_share(p: float, group_size: int) -> float:
    """Chance that all answers of a group get the same reward; each is right with chance p."""
    return p**group_size + (1 - p) ** group_size


DEAD_GROUPS = Exercise(
    id="05.4",
    title="How many groups are dead?",
    kind="code",
    reference=dead_share,
    cases=lambda rng: [
        (p, G)
        for p in (0.0, round(rng.uniform(0.02, 0.2), 2), 0.5, round(rng.uniform(0.8, 0.98), 2))
        for G in (2, 8, 16)
    ],
    mutants={
        "all wrong only": Mutant(
            lambda p, G: (1 - p) ** G,
            "That counts groups that are all wrong. A group that is all right teaches nothing, "
            "either.",
        ),
        "all right only": Mutant(
            lambda p, G: p**G,
            "That counts groups that are all right. The groups that are all wrong are dead as "
            "well.",
        ),
        "alive": Mutant(
            lambda p, G: 1 - p**G - (1 - p) ** G,
            "That is the share of groups that are alive, with both right and wrong answers.",
        ),
        "in percent": Mutant(
            lambda p, G: 100 * dead_share(p, G),
            "That is in percent. A chance lies between 0 and 1.",
        ),
        "two answers": Mutant(
            lambda p, G: p**2 + (1 - p) ** 2,
            "That holds for two answers. All `group_size` answers must agree.",
        ),
        "G times": Mutant(
            lambda p, G: G * p + G * (1 - p),
            "Chances of answers that are all to happen are multiplied, not added: a power of p.",
        ),
        "both at once": Mutant(
            lambda p, G: p**G * (1 - p) ** G,
            "A group cannot be all right and all wrong at once. The two cases exclude each "
            "other: add.",
        ),
    },
    hints=(
        "When are all advantages of a group zero? There are two ways.",
        "G answers are right, independently, each with chance p: how likely is it that all of "
        "them are?",
        "The answer is two powers, added up.",
    ),
    stub='''def dead_share(p, group_size):
    """Chance that a group is dead: every answer right, or every answer wrong."""
    return ...''',
)

EXERCISES = [ADVANTAGES, FIRST_LOSS, GROUPS, DEAD_GROUPS]
