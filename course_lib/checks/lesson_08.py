"""Exercises of lesson 08: pass@k, a paired comparison, what runs allow to say, what they cost."""

from __future__ import annotations

import math
import random
import statistics

from course_lib.checks.exercise import Exercise, Mutant, Property


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n answers hold a right one, c of them being right (Chen et al. 2021)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


PASS_AT_K = Exercise(
    id="08.1",
    title="pass@k without bias",
    kind="code",
    reference=pass_at_k,
    cases=lambda rng: [
        (n, c, k)
        for n in (8, 16)
        for c in (0, rng.randrange(1, 4), 3 * n // 4, n)  # the third: 2 wrong of 8, 4 of 16
        for k in (1, 4)
    ],
    mutants={
        "with replacement": Mutant(
            lambda n, c, k: 1 - (1 - c / n) ** k,
            "That puts each answer back before the next is drawn. It is too low on average; draw "
            "without putting back.",
        ),
        "pass@1": Mutant(
            lambda n, c, k: c / n,
            "That is pass@1, whatever k is.",
        ),
        "k times": Mutant(
            lambda n, c, k: min(1.0, k * c / n),
            "It adds the chances of k draws, as if two of them could not both be right.",
        ),
        "all right": Mutant(
            lambda n, c, k: math.comb(c, k) / math.comb(n, k),
            "That is the chance that all k are right. pass@k asks for at least one.",
        ),
        "none right": Mutant(
            lambda n, c, k: math.comb(n - c, k) / math.comb(n, k),
            "That is the chance that none of the k is right. pass@k is one minus it.",
        ),
        "any of the n": Mutant(
            lambda n, c, k: float(c > 0),
            "That asks for a right one among all n, and only k are drawn. (A `//` for `/` does the "
            "same.)",
        ),
        "just enough wrong ones": Mutant(
            lambda n, c, k: 1.0 if n - c <= k else pass_at_k(n, c, k),
            "Where exactly k answers are wrong it says 1. All k may be drawn from those: only with "
            "fewer than k wrong ones is a right one certain.",
        ),
        "per cent": Mutant(
            lambda n, c, k: 100 * pass_at_k(n, c, k),
            "Those are per cents. A chance lies between 0 and 1.",
        ),
    },
    properties=(
        Property(
            lambda f, n, c, k: abs(f(n, c, 1) - c / n) < 1e-9,
            "With k = 1 it must be the plain share, c / n.",
        ),
    ),
    hints=(
        "At least one right: that is one minus the chance that none of the k is right.",
        "In how many ways can k answers be chosen from all n, and in how many from the wrong "
        "ones alone?",
        "math.comb(a, b) counts the ways; it is 0 when b is larger than a, so no special case is "
        "needed.",
    ),
    stub='''def pass_at_k(n, c, k):
    """n answers were sampled, c of them are right; the unbiased pass@k."""
    return ...''',
)


def paired_difference(before: list[float], after: list[float]) -> tuple[float, float]:
    """Mean gain on the same problems, and its standard error."""
    gains = [b - a for a, b in zip(before, after, strict=True)]
    return statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


def _unpaired(before: list[float], after: list[float]) -> tuple[float, float]:
    variance = statistics.variance(before) + statistics.variance(after)
    return paired_difference(before, after)[0], math.sqrt(variance / len(before))


def _signs_only(before: list[float], after: list[float]) -> tuple[float, float]:
    signs = [float((b > a) - (b < a)) for a, b in zip(before, after, strict=True)]
    return paired_difference([0.0] * len(signs), signs)


def _scores(rng: random.Random) -> list[tuple]:
    """Scores of single answers, then shares of four answers as in the lesson."""
    before = [float(rng.random() < 0.5) for _ in range(6)] + [0.0, 1.0]
    after = [max(b, float(rng.random() < 0.3)) for b in before[:-2]] + [1.0, 0.0]
    shares = [[rng.randrange(5) / 4 for _ in range(20)] for _ in range(2)]
    return [(before, after), tuple(shares)]


PAIRED = Exercise(
    id="08.2",
    title="Compare two models on the same problems",
    kind="code",
    reference=paired_difference,
    cases=_scores,
    mutants={
        "unpaired": Mutant(
            _unpaired,
            "The error is that of two separate samples. Both models saw the same problems, so "
            "look at the gain on each problem: hard problems are hard for both, and that noise "
            "cancels.",
        ),
        "not divided by n": Mutant(
            lambda before, after: (
                paired_difference(before, after)[0],
                paired_difference(before, after)[1] * math.sqrt(len(before)),
            ),
            "That is the spread of single gains. The error of their mean is smaller by the root "
            "of their number.",
        ),
        "sign": Mutant(
            lambda before, after: (
                -paired_difference(before, after)[0],
                paired_difference(before, after)[1],
            ),
            "The gain has the wrong sign: it is after minus before.",
        ),
        "population": Mutant(
            lambda before, after: (
                paired_difference(before, after)[0],
                statistics.pstdev(b - a for a, b in zip(before, after, strict=True))
                / math.sqrt(len(before)),
            ),
            "The spread is divided by n. For a sample it is n - 1 (statistics.stdev).",
        ),
        "variance": Mutant(
            lambda before, after: (
                paired_difference(before, after)[0],
                paired_difference(before, after)[1] ** 2,
            ),
            "The second number is a variance. Take its root, so that it has the unit of the gain.",
        ),
        "signs only": Mutant(
            _signs_only,
            "It counts which problems became better and which worse. A score may be a share of "
            "several answers: take the size of each gain.",
        ),
        "other order": Mutant(
            lambda before, after: paired_difference(before, after)[::-1],
            "The two numbers have changed places: first the mean gain, then its error.",
        ),
    },
    hints=(
        "One number per problem: its gain. After that there is only one list left.",
        "Its mean is the first result. Its standard deviation, over the root of the number of "
        "problems, is the second.",
        "statistics.mean and statistics.stdev; zip the two lists problem by problem.",
    ),
    stub='''def paired_difference(before, after):
    """(mean gain, standard error of that mean); scores of two models, problem by problem."""
    return ...''',
)


def verdicts(intervals: dict[str, tuple[float, float]]) -> dict[str, str]:
    """What a 95 % interval of the gain allows to say."""

    def verdict(low: float, high: float) -> str:
        if low > 0:
            return "better"
        return "worse" if high < 0 else "no evidence"

    return {name: verdict(*interval) for name, interval in intervals.items()}


def _by_mean(intervals: dict[str, tuple[float, float]]) -> dict[str, str]:
    return {
        name: "better" if low + high > 0 else "worse" for name, (low, high) in intervals.items()
    }


def _runs(rng: random.Random) -> list[tuple]:
    drawn = [
        (round(rng.uniform(0.02, 0.1), 2), round(rng.uniform(0.2, 0.3), 2)),
        (-round(rng.uniform(0.02, 0.05), 2), round(rng.uniform(0.08, 0.12), 2)),
        (-round(rng.uniform(0.08, 0.12), 2), round(rng.uniform(0.02, 0.05), 2)),
        (-round(rng.uniform(0.2, 0.3), 2), -round(rng.uniform(0.02, 0.1), 2)),
    ]
    rng.shuffle(drawn)
    return [(dict(zip("ABCD", drawn, strict=True)),)]


DECIDE = Exercise(
    id="08.3",
    title="Which runs are really better?",
    kind="predict",
    answers="value",
    reference=verdicts,
    cases=_runs,
    mutants={
        "by the mean": Mutant(
            _by_mean,
            "An interval that holds 0 was decided by its middle. Luck alone gives such a gain: "
            "no evidence.",
        ),
        "upper end": Mutant(
            lambda runs: {
                name: "better" if high > 0 else "worse" for name, (low, high) in runs.items()
            },
            "It looks at the upper end only. The whole interval must lie above 0.",
        ),
        "never sure": Mutant(
            lambda runs: dict.fromkeys(runs, "no evidence"),
            "Nothing is ever certain, but an interval that lies wholly on one side of 0 is "
            "evidence.",
        ),
        "turned": Mutant(
            lambda runs: {
                name: {"better": "worse", "worse": "better"}.get(v, v)
                for name, v in verdicts(runs).items()
            },
            "Better and worse are exchanged: the intervals are of after minus before.",
        ),
    },
    properties=(
        Property(
            lambda decided, runs: decided.keys() == runs.keys(),
            "Give a dict with one entry for each run, under the run's own letter.",
        ),
        Property(
            lambda decided, runs: set(decided.values()) <= {"better", "worse", "no evidence"},
            'A word is not one of "better", "worse" and "no evidence", spelled just so.',
        ),
        Property(
            lambda decided, runs: all(
                decided[name] == "no evidence"
                for name, (low, high) in runs.items()
                if low < 0 < high
            ),
            "A run was decided although its interval holds 0: luck alone could explain the gain.",
        ),
        Property(
            lambda decided, runs: decided == verdicts(runs),
            "A run whose whole interval lies on one side of 0 was not named by that side.",
        ),
    ),
    hints=(
        "Ask of each interval: does it hold 0?",
        "If 0 lies inside, chance alone could explain the gain: you cannot claim one.",
        "If both ends are above 0 the run is better, if both are below it is worse.",
    ),
    stub='decided = ...  # {"A": "better" | "worse" | "no evidence", "B": ..., "C": ..., "D": ...}',
)


def run_tokens(
    steps: int, prompts: int, group_size: int, prompt_tokens: int, completion_tokens: int
) -> tuple[int, int, int]:
    """(prefilled, sampled, trained) tokens of a GRPO run; one prefill serves a whole group."""
    groups = steps * prompts
    completions = groups * group_size
    return (
        groups * prompt_tokens,
        completions * completion_tokens,
        completions * (prompt_tokens + completion_tokens),
    )


COST = Exercise(
    id="08.4",
    title="What does a run cost?",
    kind="code",
    reference=run_tokens,
    cases=lambda rng: [
        (
            rng.choice([10, 100]),
            rng.choice([4, 16]),
            8,
            rng.randrange(15, 40),
            rng.randrange(10, 64),
        )
        for _ in range(3)
    ],
    mutants={
        "group forgotten": Mutant(
            lambda s, p, g, i, o: (s * p * i, s * p * o, s * p * (i + o)),
            "The group size is missing: every prompt gets that many completions.",
        ),
        "prompt untrained": Mutant(
            lambda s, p, g, i, o: (s * p * i, s * p * g * o, s * p * g * o),
            "The trainer reads the prompt as well: without it there is nothing for the "
            "completion to follow.",
        ),
        "prefilled G times": Mutant(
            lambda s, p, g, i, o: (s * p * g * i, s * p * g * o, s * p * g * (i + o)),
            "The prompt is prefilled once for the whole group: one sample call asks for all "
            "completions.",
        ),
        "one step": Mutant(
            lambda s, p, g, i, o: (p * i, p * g * o, p * g * (i + o)),
            "That is a single step.",
        ),
        "prompt trained once": Mutant(
            lambda s, p, g, i, o: (s * p * i, s * p * g * o, s * p * (i + g * o)),
            "The trainer reads the prompt again with every completion; only the sampler shares it "
            "within a group.",
        ),
    },
    hints=(
        "First count: how many groups in the whole run, and how many completions?",
        "Prefill happens once per group. Sampling happens once per completion. And training?",
        "A training datum is the prompt followed by the completion, and there is one for every "
        "completion.",
    ),
    stub='''def run_tokens(steps, prompts, group_size, prompt_tokens, completion_tokens):
    """(prefilled, sampled, trained) tokens of the whole run; lengths are means."""
    return ...''',
)

EXERCISES = [PASS_AT_K, PAIRED, DECIDE, COST]
