"""Who says which reply is better? A rule, a reward model, or a language model asked outright.

A judge is a function from duels to the probability that the first reply wins. A tournament turns
duels into a reward: inside a group every reply meets every other, in both orders, and is paid the
share of duels won. Order matters to a language model more than it should, so what it gains by
standing first is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.conversations import Message
from course_lib.preferences import judgement
from course_lib.rendering import render_prompt
from course_lib.rewards import BatchReward, Problem, Reward, Score
from course_lib.rl_metrics import mean

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True)
class Duel:
    """Two replies to one problem, in the order in which they are shown."""

    problem: Problem
    first: str
    second: str


Judge = Callable[[list[Duel]], list[float]]  # P(first is better), all duels at once
Strengths = Callable[[list[tuple[Problem, str]]], list[float]]  # log-strength of each reply


def reward_model(
    sampling_client: tinker.SamplingClient, tokenizer: Any, strength: str = "verdict"
) -> Strengths:
    """The trained judge of `preferences`: the log-strength of each reply, all calls in flight."""

    def strengths(replies: list[tuple[Problem, str]]) -> list[float]:
        import tinker

        distinct = list(dict.fromkeys((problem.messages, text) for problem, text in replies))
        rendered = [judgement(messages, text, tokenizer, strength) for messages, text in distinct]
        futures = [
            sampling_client.compute_logprobs(tinker.ModelInput.from_ints(each.tokens))
            for each in rendered
        ]
        found = {}
        for key, each, future in zip(distinct, rendered, futures, strict=True):
            pairs = zip(each.weights, future.result(), strict=True)
            found[key] = sum(weight * (logprob or 0.0) for weight, logprob in pairs)  # first: None
        return [found[problem.messages, text] for problem, text in replies]

    return strengths


def preference_reward(strengths: Strengths) -> BatchReward:
    """The strength itself, between 0 and 1: p("yes"). That of a whole reply is too near 0."""

    def score(problems: list[Problem], texts_P_G: list[list[str]]) -> list[list[Score]]:
        pairs = zip(problems, texts_P_G, strict=True)
        flat = [(problem, text) for problem, texts_G in pairs for text in texts_G]
        scores = iter(_judged(math.exp(each)) for each in strengths(flat))
        return [[next(scores) for _ in texts_G] for texts_G in texts_P_G]

    return BatchReward(score)


def judge_by_strength(strengths: Strengths) -> Judge:
    """P(first wins) = p_first / (p_first + p_second): each reply is looked at alone, so order is
    nothing.
    """

    def judge(duels: list[Duel]) -> list[float]:
        replies = [(duel.problem, text) for duel in duels for text in (duel.first, duel.second)]
        found = strengths(replies)
        return [_sigmoid(a - b) for a, b in zip(found[0::2], found[1::2], strict=True)]

    return judge


def judge_by_rule(reward: Reward) -> Judge:
    """The reply with the higher reward wins, an equal one draws."""

    def judge(duels: list[Duel]) -> list[float]:
        gaps = [
            reward(duel.problem, duel.first).value - reward(duel.problem, duel.second).value
            for duel in duels
        ]
        return [0.5 if abs(gap) < 1e-9 else float(gap > 0) for gap in gaps]

    return judge


def judge_by_asking(sampling_client: tinker.SamplingClient, tokenizer: Any) -> Judge:
    """A language model reads both replies and says A or B: P(A) against P(B)."""

    def judge(duels: list[Duel]) -> list[float]:
        import tinker

        letters = [tokenizer.encode(each, add_special_tokens=False)[0] for each in "AB"]
        futures = []
        for duel in duels:
            prompt = render_prompt((Message("user", _question(duel)),), tokenizer)
            for letter in letters:
                tokens = tinker.ModelInput.from_ints([*prompt, letter])
                futures.append(sampling_client.compute_logprobs(tokens))
        found = [future.result()[-1] for future in futures]
        return [_sigmoid(a - b) for a, b in zip(found[0::2], found[1::2], strict=True)]

    return judge


def tournament_reward(judge: Judge) -> BatchReward:
    """The share of duels won against the siblings, each fought in both orders.

    The part `position_bias` is what the judge gave to standing first: mean P(first wins) - 0.5,
    which is 0 over both orders for a judge that does not look at the order. Both orders being
    asked, it does not reach the reward.
    """

    def score(problems: list[Problem], texts_P_G: list[list[str]]) -> list[list[Score]]:
        orders = [
            [(i, j) for i in range(len(texts_G)) for j in range(len(texts_G)) if i != j]
            for texts_G in texts_P_G
        ]
        duels = [
            Duel(problem, texts_G[i], texts_G[j])
            for problem, texts_G, order in zip(problems, texts_P_G, orders, strict=True)
            for i, j in order
        ]
        wins = iter(judge(duels))
        return [
            _group_scores(len(texts_G), {pair: next(wins) for pair in order})
            for texts_G, order in zip(texts_P_G, orders, strict=True)
        ]

    return BatchReward(score)


def win_matrix(judge: Judge, problem: Problem, texts_G: list[str]) -> list[list[float]]:
    """Row i, column j: P(i beats j), i shown first; a reply against itself is position bias."""
    wins = iter(judge([Duel(problem, first, second) for first in texts_G for second in texts_G]))
    return [[next(wins) for _ in texts_G] for _ in texts_G]


def win_rate(judge: Judge, problems: list[Problem], texts: list[str], others: list[str]) -> float:
    """How often `texts` beat `others` on the same problems, both orders asked; 0.5 = no better."""
    triples = list(zip(problems, texts, others, strict=True))
    forward = judge([Duel(problem, text, other) for problem, text, other in triples])
    backward = judge([Duel(problem, other, text) for problem, text, other in triples])
    return mean([(win + 1 - loss) / 2 for win, loss in zip(forward, backward, strict=True)])


def position_bias(judge: Judge, duels: list[Duel]) -> float:
    """Mean P(first wins) - 0.5 over both orders: 0 for a judge that does not look at the order."""
    swapped = [Duel(duel.problem, duel.second, duel.first) for duel in duels]
    return mean(judge(duels) + judge(swapped)) - 0.5


def _group_scores(size: int, wins: dict[tuple[int, int], float]) -> list[Score]:
    bias = mean(list(wins.values())) - 0.5 if wins else 0.0
    scores = []
    for i in range(size):
        # duel (i, j) shows i first, duel (j, i) shows it second
        won = [(wins[i, j] + 1 - wins[j, i]) / 2 for j in range(size) if j != i]
        value = mean(won) if won else 0.5
        parts = {"tournament": value, "position_bias": bias}
        scores.append(Score(value, parts, f"won {sum(won):.1f} of {len(won)} duels"))
    return scores


def _judged(strength: float) -> Score:
    return Score(strength, {"preference": strength}, f"judged {strength:.2f}")


def _question(duel: Duel) -> str:
    asked = duel.problem.messages[-1].content
    return (
        f"Question: {asked}\nReply A: {duel.first}\nReply B: {duel.second}\n"
        "Which reply is better, A or B?"
    )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
