"""Exercises of lesson 07: which KL, the length bias, the temperature, DPO for contrast."""

from __future__ import annotations

import math
import random

from course_lib.checks.exercise import Exercise, Mutant, Property

Numbers = list[float]


def kl_k3(policy_logprobs: Numbers, reference_logprobs: Numbers) -> float:
    """Mean of exp(d) - 1 - d, d = reference - policy, over sampled tokens (Schulman 2020)."""
    differences = [ref - pol for pol, ref in zip(policy_logprobs, reference_logprobs, strict=True)]
    return sum(math.exp(d) - 1 - d for d in differences) / len(differences)


def _mean_of(term):
    def estimate(policy: Numbers, reference: Numbers) -> float:
        values = [term(ref - pol) for pol, ref in zip(policy, reference, strict=True)]
        return sum(values) / len(values)

    return estimate


def _logprob_pairs(rng: random.Random) -> list[tuple]:
    cases = []
    for length in (1, 4, 8):
        policy = [round(-rng.uniform(0.1, 2), 2) for _ in range(length)]
        cases.append((policy, [round(p - rng.uniform(-0.5, 1.2), 2) for p in policy]))
    return cases


KL_K3 = Exercise(
    id="07.1",
    title="The right KL, in the right direction",
    kind="code",
    reference=kl_k3,
    cases=_logprob_pairs,
    mutants={
        "inverse ratio": Mutant(
            _mean_of(lambda d: math.exp(-d) - 1 + d),
            "The ratio is upside down: with samples from the policy that estimates something "
            "else (on three outcomes you can compute it: 0.968 where the KL is 0.635). Use "
            "reference minus policy.",
        ),
        "k1": Mutant(
            _mean_of(lambda d: -d),
            "That is k1: right on average, but single values are negative and it varies a lot. "
            "k3 adds a term whose mean is zero.",
        ),
        "k2": Mutant(
            _mean_of(lambda d: d * d / 2),
            "That is k2, half the squared difference: small variance, and biased far from the "
            "reference.",
        ),
        "sign": Mutant(
            lambda policy, reference: -kl_k3(policy, reference),
            "The sign is turned: a KL is never negative.",
        ),
        "sum": Mutant(
            lambda policy, reference: kl_k3(policy, reference) * len(policy),
            "That is the sum over the tokens; the mean does not grow with the length.",
        ),
        "no mean": Mutant(
            lambda policy, reference: [
                math.exp(q - p) - 1 - (q - p) for p, q in zip(policy, reference, strict=True)
            ],
            "Those are the values of the single tokens. Give their mean, one number.",
        ),
        "d added": Mutant(
            _mean_of(lambda d: math.exp(d) - 1 + d),
            "d is added where k3 subtracts it, so the two parts no longer balance near d = 0.",
        ),
        "two signs of d": Mutant(
            _mean_of(lambda d: math.exp(-d) - 1 - d),
            "The two d's have opposite signs. Take the difference once, reference minus policy, "
            "and use it in both places.",
        ),
        "weighted again": Mutant(
            lambda policy, reference: sum(
                math.exp(p) * (p - q) for p, q in zip(policy, reference, strict=True)
            ),
            "It weighs each token by its probability. The tokens were sampled, so likely ones "
            "already come more often: a plain mean is enough.",
        ),
    },
    properties=(
        Property(
            lambda f, p, q: f(p, q) >= 0,
            "Every single k3 value is at least 0, so the mean must be, too.",
        ),
        Property(lambda f, p, q: abs(f(p, p)) < 1e-9, "Of a policy with itself the KL must be 0."),
    ),
    hints=(
        "Samples come from the policy. Let d be the reference's log-probability minus the "
        "policy's.",
        "-d alone (k1) is unbiased. exp(d) - 1 has mean zero under the policy: adding it keeps "
        "the mean.",
        "The sum of the two is never negative. Average it over the tokens.",
    ),
    stub='''def kl_k3(policy_logprobs, reference_logprobs):
    """Estimate of KL(policy || reference) per token, from tokens that the policy sampled."""
    return ...''',
)


def token_advantages(advantages_G: Numbers, lengths_G: list[int], max_tokens: int) -> Numbers:
    """What every token of a completion gets: A over one constant for all (Dr. GRPO)."""
    return [advantage / max_tokens for advantage in advantages_G]


LENGTH_BIAS = Exercise(
    id="07.3",
    title="Take the length bias out",
    kind="find the bug",
    reference=token_advantages,
    cases=lambda rng: [
        ([0.5, -0.5, 0.25, -0.25], [rng.randrange(3, 60) for _ in range(4)], limit)
        for limit in (64, 128)
    ],
    mutants={
        "own length": Mutant(
            lambda a, n, limit: [x / m for x, m in zip(a, n, strict=True)],
            "Each completion is divided by its own length. Then a long wrong answer is punished "
            "less per token than a short one, and wrong answers grow long.",
        ),
        "mean length": Mutant(
            lambda a, n, limit: [x * len(n) / sum(n) for x in a],
            "It divides by the group's mean length. Within the group all is fair, but groups of "
            "short answers weigh more than groups of long ones: use one constant for the whole "
            "run.",
        ),
        "longest": Mutant(
            lambda a, n, limit: [x / max(n) for x in a],
            "It divides by the group's longest completion, which changes from group to group. "
            "Use one constant.",
        ),
        "not divided": Mutant(
            lambda a, n, limit: list(a),
            "Nothing is divided. There is no bias in that, and the course's own loop does just "
            "that: Adam does not mind a constant factor. Here divide by the constant that is "
            "given, max_tokens.",
        ),
        "group size": Mutant(
            lambda a, n, limit: [x / len(a) for x in a],
            "It divides by the number of answers. No answer can choose that, so there is no bias "
            "in it. Here divide by the constant that is given, max_tokens.",
        ),
        "all tokens of the group": Mutant(
            lambda a, n, limit: [x / sum(n) for x in a],
            "It divides by the tokens of the whole group. Within the group all is fair, but a "
            "group can still change its own divisor.",
        ),
        "one entry a token": Mutant(
            lambda a, n, limit: [[x / limit] * m for x, m in zip(a, n, strict=True)],
            "That repeats the number for every token. Give it once for each completion.",
        ),
    },
    hints=(
        "Two wrong answers, one of 5 tokens and one of 50: what does each of their tokens lose "
        "in the broken version?",
        "A divisor that depends on the completion gives the model a way to change its own "
        "punishment.",
        "Which of the three arguments is the same for every completion of the run?",
    ),
    stub='''def token_advantages(advantages_G, lengths_G, max_tokens):
    """For each completion the advantage that each of its tokens carries, with no length bias."""
    return ...''',
)


def log_ratio_at_start(logits: Numbers, token: int, temperature: float) -> float:
    """Log ratio of an untouched model: trainer (temperature 1) over a sampler at `temperature`."""
    return _logprob(logits, token) - _logprob([z / temperature for z in logits], token)


def _logprob(logits: Numbers, token: int) -> float:
    return logits[token] - math.log(sum(math.exp(z) for z in logits))


TEMPERATURE = Exercise(
    id="07.2",
    title="A ratio that is not 1 before the first step",
    kind="code",
    reference=log_ratio_at_start,
    cases=lambda rng: [
        ([round(rng.uniform(-2, 2), 1) for _ in range(4)], rng.randrange(4), temperature)
        for temperature in (0.5, 0.7, 1.0, 1.5)
    ],
    mutants={
        "not normalised": Mutant(
            lambda z, t, T: z[t] - z[t] / T,
            "Those are logits. Each of the two distributions has to be normalised before they "
            "are compared.",
        ),
        "upside down": Mutant(
            lambda z, t, T: -log_ratio_at_start(z, t, T),
            "The sampler stands above the line. The ratio is trainer over sampler.",
        ),
        "multiplied": Mutant(
            lambda z, t, T: log_ratio_at_start(z, t, 1 / T),
            "The logits are multiplied by the temperature. A temperature below 1 sharpens: divide.",
        ),
        "no mismatch": Mutant(
            lambda z, t, T: 0.0,
            "It would be 0 if both used the same temperature. The trainer's log-probabilities "
            "are always at 1.",
        ),
        "logprob divided": Mutant(
            lambda z, t, T: _logprob(z, t) * (1 - 1 / T),
            "A log-probability was divided by the temperature. Divide the logits, and normalise "
            "after that.",
        ),
        "the ratio": Mutant(
            lambda z, t, T: math.exp(log_ratio_at_start(z, t, T)),
            "That is the ratio. Give its logarithm.",
        ),
    },
    properties=(
        Property(
            lambda f, z, t, T: abs(f(z, t, 1.0)) < 1e-9,
            "At temperature 1 sampler and trainer agree: the log ratio is 0.",
        ),
    ),
    hints=(
        "The same logits, two distributions: one at temperature 1, one at the sampler's "
        "temperature.",
        "A log-probability is the logit minus the logarithm of the sum of exp over all logits.",
        "Write that once as a small function of logits, use it twice, subtract.",
    ),
    stub='''def log_ratio_at_start(logits, token, temperature):
    """log(trainer's probability / sampler's probability) of one token; the weights are equal."""
    return ...''',
)


def dpo_loss(policy: tuple[float, float], reference: tuple[float, float], beta: float) -> float:
    """-log sigmoid(beta x (gain of chosen - of rejected)) (Rafailov et al. 2023, equation 7)."""
    margin = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    return math.log1p(math.exp(-margin))


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def _sequence_pairs(rng: random.Random) -> list[tuple]:
    cases = []
    for beta in (0.1, 0.5):
        reference = (round(-rng.uniform(5, 20), 1), round(-rng.uniform(5, 20), 1))
        moved = tuple(round(r + rng.uniform(-3, 3), 1) for r in reference)
        cases += [(moved, reference, beta), (reference, reference, beta)]
    return cases


DPO = Exercise(
    id="07.4",
    title="DPO, for contrast",
    kind="code",
    reference=dpo_loss,
    cases=_sequence_pairs,
    mutants={
        "no reference": Mutant(
            lambda p, r, beta: _softplus(-beta * (p[0] - p[1])),
            "The reference is missing. Then the loss depends on which answer is shorter; what "
            "counts is how much the policy has *moved* from the reference.",
        ),
        "exchanged": Mutant(
            lambda p, r, beta: _softplus(beta * ((p[0] - r[0]) - (p[1] - r[1]))),
            "Chosen and rejected are exchanged: it teaches the rejected answer.",
        ),
        "beta outside": Mutant(
            lambda p, r, beta: beta * _softplus(-((p[0] - r[0]) - (p[1] - r[1]))),
            "beta stands outside. Inside the sigmoid it sets how far the policy may move; "
            "outside it only scales the loss.",
        ),
        "no logarithm": Mutant(
            lambda p, r, beta: 1 - 1 / (1 + math.exp(-beta * ((p[0] - r[0]) - (p[1] - r[1])))),
            "That is a probability. The loss is minus the logarithm of the sigmoid.",
        ),
        "no sigmoid": Mutant(
            lambda p, r, beta: -beta * ((p[0] - r[0]) - (p[1] - r[1])),
            "The sigmoid and its logarithm are missing: a pair that is settled would go on pulling "
            "for ever. The loss of a large gap is nearly 0.",
        ),
        "no beta": Mutant(
            lambda p, r, beta: _softplus(-((p[0] - r[0]) - (p[1] - r[1]))),
            "beta is missing. It multiplies the difference of the two gains, inside the sigmoid.",
        ),
        "sign": Mutant(
            lambda p, r, beta: -dpo_loss(p, r, beta),
            "The minus sign is missing: a logarithm of a sigmoid is negative, and a loss is not.",
        ),
        "ratios of probabilities": Mutant(
            lambda p, r, beta: _softplus(-beta * (math.exp(p[0] - r[0]) - math.exp(p[1] - r[1]))),
            "It compares the ratios themselves. The formula takes their logarithms, which are "
            "plain differences of logprobs.",
        ),
        "rewards of chosen only": Mutant(
            lambda p, r, beta: _softplus(-beta * (p[0] - r[0])),
            "Only the chosen answer is looked at. DPO compares its gain with the gain of the "
            "rejected one.",
        ),
    },
    hints=(
        "How much did the policy raise the chosen answer, compared with the reference? And the "
        "rejected one?",
        "The difference of these two gains, times beta, goes into a sigmoid.",
        "Where policy and reference agree, the loss must be log 2. Then minus log sigmoid(x) is "
        "log(1 + exp(-x)).",
    ),
    stub='''def dpo_loss(policy, reference, beta):
    """policy and reference are (logprob of chosen, logprob of rejected), summed over tokens."""
    return ...''',
)

EXERCISES = [KL_K3, TEMPERATURE, LENGTH_BIAS, DPO]
