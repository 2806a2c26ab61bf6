"""Exercises of lesson 06: importance sampling, PPO's clip, its gradient, effective samples."""

from __future__ import annotations

import math
import random

from course_lib.checks.exercise import Exercise, Mutant, Property

Numbers = list[float]


def is_loss(
    target_logprobs: Numbers, sampling_logprobs: Numbers, advantages: Numbers, mask: Numbers
) -> float:
    """Sum over completion tokens of -ratio x advantage."""
    tokens = zip(target_logprobs, sampling_logprobs, advantages, mask, strict=True)
    return -sum(math.exp(lp - q) * a * m for lp, q, a, m in tokens)


def _with_ratio(ratio):
    def loss(lp: Numbers, q: Numbers, a: Numbers, m: Numbers) -> float:
        return -sum(ratio(x, y) * z * w for x, y, z, w in zip(lp, q, a, m, strict=True))

    return loss


def _tokens(rng: random.Random) -> list[tuple]:
    cases = []
    for length in (3, 6, 8):
        sampled = [round(-rng.uniform(0.1, 3), 2) for _ in range(length)]
        target = [round(q + rng.uniform(-0.6, 0.6), 2) for q in sampled]
        advantages = [rng.choice([-0.5, 0.25, 0.75]) for _ in range(length)]  # several answers
        prompt = rng.randrange(1, length - 1)
        cases.append((target, sampled, advantages, [float(i >= prompt) for i in range(length)]))
    return [*cases, (*cases[-1][:3], [1.0] * length)]  # no prompt: the first token counts as well


IS_LOSS = Exercise(
    id="06.1",
    title="The importance-sampling loss",
    kind="code",
    reference=is_loss,
    cases=_tokens,
    mutants={
        "sign": Mutant(
            lambda lp, q, a, m: -is_loss(lp, q, a, m),
            "The sign is turned: minimising it would make good answers rarer.",
        ),
        "no exponential": Mutant(
            _with_ratio(lambda lp, q: lp - q),
            "The difference of log-probabilities is the logarithm of the ratio. At equal "
            "policies it is 0, and the ratio is 1: take exp.",
        ),
        "upside down": Mutant(
            _with_ratio(lambda lp, q: math.exp(q - lp)),
            "The ratio is upside down: the model in training stands above the line, the sampler "
            "below.",
        ),
        "prompt included": Mutant(
            lambda lp, q, a, m: is_loss(lp, q, a, [1.0] * len(lp)),
            "The prompt's tokens are counted. Nobody sampled them, so they have no ratio: use "
            "the mask.",
        ),
        "mean": Mutant(
            lambda lp, q, a, m: is_loss(lp, q, a, m) / sum(m),
            "That is the mean over the tokens. The SDK's losses are sums; a caller who wants a "
            "mean scales the advantages.",
        ),
        "mean of all positions": Mutant(
            lambda lp, q, a, m: is_loss(lp, q, a, m) / len(lp),
            "That is a mean, and the question's positions count in it as well. The SDK's losses "
            "are sums.",
        ),
        "no ratio": Mutant(
            _with_ratio(lambda lp, q: lp),
            "That is plain REINFORCE, -A x logprob: right on policy, and biased as soon as the "
            "weights have moved.",
        ),
        "quotient of logarithms": Mutant(
            _with_ratio(lambda lp, q: lp / q),
            "It divides one log-probability by the other. The ratio is one of probabilities: exp "
            "of the difference.",
        ),
        "one advantage": Mutant(
            lambda lp, q, a, m: is_loss(lp, q, [a[0]] * len(a), m),
            "It takes one advantage for all tokens. Several answers may stand in the lists: each "
            "token has an advantage of its own.",
        ),
        "mean advantage": Mutant(
            lambda lp, q, a, m: is_loss(lp, q, [sum(a) / len(a)] * len(a), m),
            "It takes the mean of the advantages. Each token's ratio is multiplied by that token's "
            "own advantage.",
        ),
        "not summed": Mutant(
            lambda lp, q, a, m: [
                -math.exp(x - y) * z * w for x, y, z, w in zip(lp, q, a, m, strict=True)
            ],
            "Those are the losses of the single tokens. Give their sum, one number.",
        ),
        "ratio of the whole answer": Mutant(
            lambda lp, q, a, m: (
                -math.exp(sum((x - y) * w for x, y, w in zip(lp, q, m, strict=True)))
                * sum(z * w for z, w in zip(a, m, strict=True))
            ),
            "That is one ratio for the whole answer. Here each token has its own, and its own "
            "term in the sum.",
        ),
    },
    hints=(
        "Each completion token asks: how much likelier is it now than when it was sampled?",
        "A ratio of probabilities is exp of a difference of log-probabilities. Which one is "
        "subtracted?",
        "Sum ratio x advantage x mask over the tokens; good tokens must lower the loss.",
    ),
    stub='''def is_loss(target_logprobs, sampling_logprobs, advantages, mask):
    """A float, summed over tokens; four lists of equal length, mask is 1.0 on completion tokens."""
    return ...''',
)


def ppo_loss(ratio: float, advantage: float, low: float, high: float) -> float:
    """-min(r A, clip(r, low, high) A) of one token (Schulman et al. 2017, equation 7)."""
    clipped = min(max(ratio, low), high)
    return -min(ratio * advantage, clipped * advantage)


def _clipped(ratio: float, low: float, high: float) -> float:
    return min(max(ratio, low), high)


def _ratios(rng: random.Random) -> list[tuple]:
    """Ratios on every side of 1 and of both pairs of bounds, and between those pairs."""
    places = ((0.2, 0.6), (0.72, 0.78), (0.85, 0.95), (1.05, 1.15), (1.22, 1.26), (1.4, 3.0))
    ratios = [round(rng.uniform(*place), 2) for place in places]
    bounds = ((0.8, 1.2), (0.7, 1.28))
    return [(r, a, *pair) for r in ratios for a in (1.0, 1.5, -0.5) for pair in bounds]


PPO_LOSS = Exercise(
    id="06.3",
    title="PPO's clipped loss",
    kind="code",
    reference=ppo_loss,
    cases=_ratios,
    mutants={
        "maximum": Mutant(
            lambda r, a, low, high: -max(r * a, _clipped(r, low, high) * a),
            "It takes the larger of the two objectives. The pessimistic one is the smaller: it "
            "forgives nothing.",
        ),
        "clip only": Mutant(
            lambda r, a, low, high: -_clipped(r, low, high) * a,
            "Only the clipped ratio is used. A bad token that became much likelier then has no "
            "gradient back; the minimum with the unclipped term keeps that one.",
        ),
        "thresholds as distances": Mutant(
            lambda r, a, low, high: -min(r * a, _clipped(r, 1 - low, 1 + high) * a),
            "The thresholds are read as distances from 1. The SDK's are ratios themselves: 0.8 "
            "and 1.2.",
        ),
        "sign": Mutant(
            lambda r, a, low, high: -ppo_loss(r, a, low, high),
            "That is the objective, to be raised. A loss is minus that.",
        ),
        "no clip": Mutant(
            lambda r, a, low, high: -r * a,
            "Nothing is clipped: that is the importance-sampling loss.",
        ),
        "product clipped": Mutant(
            lambda r, a, low, high: -min(r * a, _clipped(r * a, low, high)),
            "The product of ratio and advantage is clipped. Clip the ratio alone, then multiply "
            "by the advantage.",
        ),
        "bounds of its own": Mutant(
            lambda r, a, low, high: ppo_loss(r, a, 0.8, 1.2),
            "It has bounds of its own. Take those that are given: low and high may differ from "
            "0.8 and 1.2.",
        ),
        "minimum of the ratios": Mutant(
            lambda r, a, low, high: -min(r, _clipped(r, low, high)) * a,
            "It takes the smaller ratio, and then multiplies. With a negative advantage the larger "
            "ratio gives the smaller product: multiply both first, then take the minimum.",
        ),
        "upper bound only": Mutant(
            lambda r, a, low, high: -min(r * a, min(r, high) * a),
            "The lower bound is missing: a bad token that has become rare enough is still pushed "
            "down.",
        ),
    },
    properties=(
        Property(
            lambda f, r, a, low, high: abs(f(1.0, a, low, high) + a) < 1e-6,
            "At a ratio of 1 nothing is clipped, and the loss must be minus the advantage.",
        ),
    ),
    hints=(
        "Two candidates: the ratio times the advantage, and the same with a ratio that was kept "
        "within bounds.",
        "PPO is a pessimist: of the two objectives it believes the smaller. Think of the sign of "
        "the advantage.",
        "Clip with min and max, take the minimum of the two products, and turn the objective "
        "into a loss.",
    ),
    stub='''def ppo_loss(ratio, advantage, low, high):
    """The loss of one token; low and high are ratios, e.g. 0.8 and 1.2."""
    return ...''',
)


def ppo_learns(ratio: float, advantage: float, low: float, high: float) -> bool:
    """Whether PPO has a gradient here: not past the bound that the token is pushed towards."""
    if advantage > 0:
        return ratio < high
    return ratio > low


PPO_GRADIENT = Exercise(
    id="06.4",
    title="Which tokens still learn?",
    kind="predict",
    reference=ppo_learns,
    cases=_ratios,
    mutants={
        "both sides": Mutant(
            lambda r, a, low, high: low < r < high,
            "It stops outside the bounds on both sides. A good token that became *rarer* (ratio "
            "below the lower bound) must still be pulled back up: look at the sign of the "
            "advantage.",
        ),
        "exchanged": Mutant(
            lambda r, a, low, high: r > low if a > 0 else r < high,
            "The bounds are exchanged. A good token (A > 0) is pushed up, so it is the upper "
            "bound that stops it.",
        ),
        "always": Mutant(
            lambda r, a, low, high: True,
            "That holds for CISPO, whose every token keeps a gradient. PPO drops the ones past "
            "their bound.",
        ),
        "upper bound only": Mutant(
            lambda r, a, low, high: r < high,
            "The upper bound stops only good tokens. A bad token far above it must be pushed "
            "down, and is.",
        ),
        "one for a bound": Mutant(
            lambda r, a, low, high: r < high if a > 0 else r > 1,
            "A bad token falls silent at the lower bound, not as soon as it is rarer at all.",
        ),
        "bounds of its own": Mutant(
            lambda r, a, low, high: r < 1.2 if a > 0 else r > 0.8,
            "It has bounds of its own. Take those that are given: low and high may differ from "
            "0.8 and 1.2.",
        ),
        "the silent ones": Mutant(
            lambda r, a, low, high: not ppo_learns(r, a, low, high),
            "That names the silent tokens. Give True for those that still have a gradient.",
        ),
        "good tokens only": Mutant(
            lambda r, a, low, high: not (a > 0 and r > high),
            "It silences good tokens only. A bad token falls silent as well, once it is rare "
            "enough.",
        ),
    },
    hints=(
        "The minimum picks one of two terms. Which of them contains the ratio itself, and which "
        "a constant?",
        "For A > 0 the token is pushed up. At which bound does the constant take over?",
        "For A < 0 it is pushed down, so it is the lower bound that matters. One line for each "
        "sign.",
    ),
    stub='''def ppo_learns(ratio, advantage, low, high):
    """True if the PPO loss of this token has a gradient (the advantage is not 0)."""
    return ...''',
)


def effective_sample_size(ratios: Numbers) -> float:
    """How many on-policy samples these weighted ones are worth: (sum r)^2 / sum r^2 (Kish 1965)."""
    return sum(ratios) ** 2 / sum(r * r for r in ratios)


ESS = Exercise(
    id="06.2",
    title="What are stale samples worth?",
    kind="code",
    reference=effective_sample_size,
    cases=lambda rng: [
        ([round(math.exp(rng.gauss(0, spread)), 3) for _ in range(n)],)
        for n, spread in ((4, 0.2), (8, 0.8), (16, 1.5))
    ],
    mutants={
        "the count": Mutant(
            lambda ratios: float(len(ratios)),
            "That is how many samples there are. If a few ratios carry all the weight, they are "
            "worth fewer.",
        ),
        "upside down": Mutant(
            lambda ratios: sum(r * r for r in ratios) / sum(ratios) ** 2,
            "The fraction is upside down: with equal ratios the result must be the number of "
            "samples.",
        ),
        "not squared": Mutant(
            lambda ratios: sum(ratios) / sum(r * r for r in ratios),
            "The sum above the line is not squared, so the result changes when all ratios are "
            "doubled.",
        ),
        "a share": Mutant(
            lambda ratios: effective_sample_size(ratios) / len(ratios),
            "That is the share of the samples (between 0 and 1). Give their number.",
        ),
    },
    properties=(
        Property(
            lambda f, ratios: abs(f([2 * r for r in ratios]) - f(ratios)) < 1e-6 * len(ratios),
            "Doubling all ratios must change nothing: only their differences matter.",
        ),
    ),
    hints=(
        "Equal ratios: all samples count. One huge ratio: only one counts. Which fraction does "
        "both?",
        "Above the line the square of a sum, below it the sum of squares.",
        "Try it on [1, 1, 1, 1] and on [100, 0, 0, 0] by hand before you check.",
    ),
    stub='''def effective_sample_size(ratios):
    """Between 1 and len(ratios)."""
    return ...''',
)

EXERCISES = [IS_LOSS, ESS, PPO_LOSS, PPO_GRADIENT]
