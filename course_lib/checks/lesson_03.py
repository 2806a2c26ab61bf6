"""Exercises of lesson 03: the weighted loss, the batches, the schedule, which resume it was."""

from __future__ import annotations

import math
import random
from itertools import combinations, pairwise

from course_lib.checks.exercise import Exercise, Mutant, Property


def weighted_nll(logprobs_D_T: list[list[float]], weights_D_T: list[list[float]]) -> float:
    """Mean loss in nats per trained token, over the whole batch."""
    pairs = [
        (logprob, weight)
        for logprobs_T, weights_T in zip(logprobs_D_T, weights_D_T, strict=True)
        for logprob, weight in zip(logprobs_T, weights_T, strict=True)
    ]
    total = sum(weight for _, weight in pairs)
    return -sum(logprob * weight for logprob, weight in pairs) / total


def _per_row(logprobs_D_T: list, weights_D_T: list) -> float:
    rows = [
        weighted_nll([logprobs], [weights])
        for logprobs, weights in zip(logprobs_D_T, weights_D_T, strict=True)
    ]
    return sum(rows) / len(rows)


def _batches_of_logprobs(rng: random.Random) -> list[tuple]:
    cases = []
    for lengths in ([5], [4, 7], [3, 8, 6]):
        logprobs = [[round(-rng.uniform(0.1, 4), 2) for _ in range(n)] for n in lengths]
        weights = [[float(i >= n - rng.randrange(1, n - 1)) for i in range(n)] for n in lengths]
        cases.append((logprobs, weights))
    halved = [[weight / 2 for weight in weights_T] for weights_T in weights[:1]]
    return [*cases, (logprobs, halved + weights[1:])]


WEIGHTED_NLL = Exercise(
    id="03.1",
    title="The weighted mean loss",
    kind="code",
    reference=weighted_nll,
    cases=_batches_of_logprobs,
    mutants={
        "all tokens": Mutant(
            lambda lp, w: weighted_nll(lp, w) * sum(map(sum, w)) / sum(map(len, lp)),
            "It divides by the number of all tokens. Prompt tokens have weight 0 and must not "
            "make the loss look small: divide by the sum of the weights.",
        ),
        "mean of means": Mutant(
            _per_row,
            "It averages each conversation first. Then a token of a short answer counts more "
            "than one of a long answer; here every trained token counts the same.",
        ),
        "sum": Mutant(
            lambda lp, w: weighted_nll(lp, w) * sum(map(sum, w)),
            "That is the sum, which is what the SDK reports as loss:sum. It grows with the "
            "batch; divide by the weights.",
        ),
        "sign": Mutant(
            lambda lp, w: -weighted_nll(lp, w),
            "The sign is missing: log-probabilities are negative, a loss is positive.",
        ),
        "counts tokens": Mutant(
            lambda lp, w: (
                weighted_nll(lp, w) * sum(map(sum, w)) / sum(x > 0 for row in w for x in row)
            ),
            "It divides by the number of tokens that have a weight. A weight may be a half: "
            "divide by the sum of the weights.",
        ),
        "yes or no": Mutant(
            lambda lp, w: weighted_nll(lp, [[float(x > 0) for x in row] for row in w]),
            "It takes each weight as yes or no. A weight may be a half: multiply by it.",
        ),
        "per conversation": Mutant(
            lambda lp, w: weighted_nll(lp, w) * sum(map(sum, w)) / len(w),
            "It divides by the number of conversations. A long answer then makes the loss look "
            "large: divide by the sum of the weights.",
        ),
        "questions above the line": Mutant(
            lambda lp, w: -sum(map(sum, lp)) / sum(map(sum, w)),
            "Below the line stand the weights, above it they are missing: multiply each "
            "log-probability by its weight.",
        ),
        "no weights": Mutant(
            lambda lp, w: weighted_nll(lp, [[1.0] * len(row) for row in lp]),
            "The weights are not used: the questions count as much as the answers.",
        ),
    },
    hints=(
        "One fraction for the whole batch: what stands above the line, what below?",
        "Above: minus the sum of log-probability times weight. Below: how many tokens were "
        "trained on.",
        "Two running sums over all conversations and all tokens, and one division at the very end.",
    ),
    stub='''def weighted_nll(logprobs_D_T, weights_D_T):
    """Nats per trained token over the batch; D conversations of T tokens each (T varies)."""
    return ...''',
)


def learning_rate_at(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear up over `warmup` steps (the last at the peak), then down; step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / (total - warmup)


def _from_zero(step: int, total: int, peak: float, warmup: int) -> float:
    return peak * step / warmup if step < warmup else learning_rate_at(step, total, peak, warmup)


def _to_zero_early(step: int, total: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return learning_rate_at(step, total, peak, warmup)
    return peak * (total - 1 - step) / (total - 1 - warmup)


def _whole_run(step: int, total: int, peak: float, warmup: int) -> float:
    return (
        learning_rate_at(step, total, peak, warmup)
        if step < warmup
        else peak * (total - step) / total
    )


def _cosine(step: int, total: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return learning_rate_at(step, total, peak, warmup)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def _steps(rng: random.Random) -> list[tuple]:
    total, warmup, peak = rng.randrange(20, 60), rng.randrange(3, 8), rng.choice([1e-3, 5e-4])
    return [
        (step, total, peak, warmup)
        for step in (0, 1, warmup - 1, warmup, warmup + 1, total - 2, total - 1)
    ]


SCHEDULE = Exercise(
    id="03.3",
    title="A learning rate that rises and falls",
    kind="code",
    reference=learning_rate_at,
    cases=_steps,
    mutants={
        "starts at zero": Mutant(
            _from_zero,
            "The first step has rate 0: a whole batch is computed and thrown away. Begin with "
            "peak / warmup.",
        ),
        "ends at zero": Mutant(
            _to_zero_early,
            "The last step has rate 0, so the last batch teaches nothing. Zero is reached after "
            "the last step.",
        ),
        "no warm-up": Mutant(
            lambda step, total, peak, warmup: peak * (total - step) / total,
            "There is no warm-up: the first steps, whose gradients are the wildest, get the full "
            "rate.",
        ),
        "jumps": Mutant(
            _whole_run,
            "It falls as if there had been no warm-up, so the rate jumps down when the warm-up "
            "ends. Only the steps after it share the way down.",
        ),
        "always the peak": Mutant(
            lambda step, total, peak, warmup: peak,
            "That is the peak at every step: it neither rises nor falls.",
        ),
        "cosine": Mutant(
            _cosine,
            "The way down is a cosine, which is used as well. Here it is a straight line.",
        ),
        "falls too soon": Mutant(
            lambda step, total, peak, warmup: (
                learning_rate_at(step, total, peak, warmup)
                if step < warmup
                else peak * (total - step) / (total - warmup + 1)
            ),
            "It falls one step too soon: the first step after the warm-up still has the peak.",
        ),
        "one share too many": Mutant(
            lambda step, total, peak, warmup: (
                peak * (step + 1) / (warmup + 1)
                if step < warmup
                else learning_rate_at(step, total, peak, warmup)
            ),
            "On the way up the peak is reached one step too late: step warmup - 1 has it.",
        ),
        "constant": Mutant(
            lambda step, total, peak, warmup: peak * min(1, (step + 1) / warmup),
            "It never comes down. The noise of a high rate stays in the final weights.",
        ),
    },
    hints=(
        "Two branches: before the warm-up is over, and after.",
        "On the way up, step 0 gets one share of the peak out of `warmup` shares, and step "
        "warmup - 1 gets all of it.",
        "On the way down, the share is the steps that remain (this one included) over the steps "
        "after the warm-up.",
    ),
    stub='''def learning_rate_at(step, total, peak, warmup):
    """step 0 .. total - 1. A straight line up: step warmup - 1 has the peak. Then a straight
    line down from the peak, which step `warmup` has, too; step `total` would have 0."""
    return ...''',
)


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers by batch: another order each epoch, repeatable, no partial batch."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, n - batch_size + 1, batch_size)]


def _with_partial(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, n, batch_size)]


def _unseeded(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    order = random.sample(range(n), n)
    return [order[i : i + batch_size] for i in range(0, n - batch_size + 1, batch_size)]


def _with_replacement(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    rng = random.Random(f"{seed}/{epoch}")
    return [[rng.randrange(n) for _ in range(batch_size)] for _ in range(n // batch_size)]


PARTIAL = (
    "There is a partial batch at the end. Its gradient comes from fewer rows and is noisier, but "
    "Adam's step is hardly smaller: drop it, the next epoch's order brings those rows back."
)
A_BATCH_IS_MISSING = (
    "A whole batch is missing: 40 rows make five batches of 8, and none of them is partial. Where "
    "does the last whole batch begin?"
)
SAME_ORDER = (
    "Two epochs have the same order, so the model meets the same batches again, and the rows of "
    "a dropped partial batch are never seen. Let the epoch into the shuffle."
)
NOT_REPEATABLE = (
    "The same seed gives another order each time. After a crash nobody could go on at the same "
    "row: seed the shuffle."
)
NOT_ONCE = (
    "A row occurs twice in one epoch while others are left out. Shuffle the rows, then cut; do "
    "not draw."
)
SAME_FOR_ALL_SEEDS = (
    "Another seed gives the same order. Two runs with two seeds should differ: let the seed into "
    "the shuffle, beside the epoch."
)
NEIGHBOURS = (
    "Rows that are neighbours in the file are neighbours in every batch. Shuffle the rows, not the "
    "batches."
)
SAME_COMPANY = (
    "Rows that share a batch in one epoch share one in the next: the order is only turned round or "
    "moved along, or whole batches change places. Shuffle all rows anew for each epoch."
)
AGAIN = 0.4  # share of a batch's pairs that meet again: 1/6 by chance, 3/7 in an order moved along


def _met(batches: list[list[int]]) -> set[frozenset[int]]:
    return {frozenset(pair) for batch in batches for pair in combinations(batch, 2)}


def _neighbours(batch: list[int]) -> bool:
    return all(second - first == 1 for first, second in pairwise(batch))


def _batches_shuffled(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    whole = range(0, n - batch_size + 1, batch_size)
    batches = [list(range(start, start + batch_size)) for start in whole]
    random.Random(f"{seed}/{epoch}").shuffle(batches)
    return batches


BATCHES = Exercise(
    id="03.2",
    title="Mend the batches",
    kind="find the bug",
    reference=epoch_batches,
    cases=lambda rng: [
        *[(rng.randrange(41, 44), 8, rng.randrange(100), epoch) for epoch in range(3)],
        (41, 8, 0, 1),
        (40, 8, 1, 0),
    ],
    same=None,
    properties=(
        Property(
            lambda f, *case: (
                isinstance(f(*case), list)
                and all(isinstance(row, int) for batch in f(*case) for row in batch)
            ),
            "It should give a list of batches, and each batch is a list of row numbers.",
        ),
        Property(
            lambda f, n, size, seed, epoch: f(n, size, seed, epoch) == f(n, size, seed, epoch),
            NOT_REPEATABLE,
        ),
        Property(
            lambda f, n, size, seed, epoch: all(len(b) <= size for b in f(n, size, seed, epoch)),
            "A batch has more than batch_size rows.",
        ),
        Property(
            lambda f, n, size, seed, epoch: {len(b) for b in f(n, size, seed, epoch)} <= {size},
            PARTIAL,
        ),
        Property(
            lambda f, n, size, seed, epoch: len(f(n, size, seed, epoch)) >= n // size,
            A_BATCH_IS_MISSING,
        ),
        Property(
            lambda f, n, size, seed, epoch: (
                len({str(f(n, size, seed, e)) for e in range(epoch, epoch + 6)}) == 6
            ),
            SAME_ORDER,
        ),
        Property(
            lambda f, n, size, seed, epoch: (
                len({row for batch in f(n, size, seed, epoch) for row in batch}) == n // size * size
            ),
            NOT_ONCE,
        ),
        Property(
            lambda f, n, *rest: {row for batch in f(n, *rest) for row in batch} <= set(range(n)),
            "A row number is outside 0 .. n - 1: the first row is row 0.",
        ),
        Property(
            lambda f, n, size, seed, epoch: (
                f(n, size, seed, epoch) != f(n, size, seed + 1, epoch)
                and f(n, size, seed, epoch) != f(n, size, seed + 2, epoch)
            ),
            SAME_FOR_ALL_SEEDS,
        ),
        Property(lambda f, *case: not all(_neighbours(batch) for batch in f(*case)), NEIGHBOURS),
        Property(
            lambda f, n, size, seed, epoch: (
                len((one := _met(f(n, size, seed, epoch))) & _met(f(n, size, seed, epoch + 1)))
                < AGAIN * len(one)
            ),
            SAME_COMPANY,
        ),
        Property(
            lambda f, n, size, seed, epoch: (
                len({row for e in range(8) for batch in f(n, size, seed, e) for row in batch}) == n
            ),
            "The same rows are dropped in every epoch. Shuffle first, then drop: another epoch "
            "drops others.",
        ),
    ),
    mutants={
        "partial batch": Mutant(_with_partial, PARTIAL),
        "same order": Mutant(
            lambda n, size, seed, epoch: epoch_batches(n, size, seed, 0), SAME_ORDER
        ),
        "seed ignored": Mutant(
            lambda n, size, seed, epoch: epoch_batches(n, size, 0, epoch), SAME_FOR_ALL_SEEDS
        ),
        "batches shuffled": Mutant(_batches_shuffled, NEIGHBOURS),
        "unseeded": Mutant(_unseeded, NOT_REPEATABLE),
        "last whole batch lost": Mutant(
            lambda n, size, seed, epoch: epoch_batches(n, size, seed, epoch)[: (n - 1) // size],
            A_BATCH_IS_MISSING,
        ),
        "with replacement": Mutant(_with_replacement, NOT_ONCE),
    },
    hints=(
        "Call the broken version twice with the same arguments, ask which arguments it never uses, "
        "and look at the last batch.",
        "random.Random(something) is a generator of its own: what must that something depend on?",
        "A seed may be a string made of seed and epoch, but not that string's hash(): Python "
        "starts with another one each time. How many whole batches are there? n // batch_size.",
    ),
    stub='''def epoch_batches(n, batch_size, seed, epoch):
    """Rows 0 .. n - 1 in whole batches: another order each epoch, repeatable, none partial."""
    return ...''',
)


def which_resume(uninterrupted: list[float], resumed: dict[str, list[float]]) -> dict[str, str]:
    """Label three resumed runs by how far their losses stray from the uninterrupted run."""

    def distance(name: str) -> float:
        return max(abs(a - b) for a, b in zip(uninterrupted, resumed[name], strict=True))

    return dict(zip(sorted(resumed, key=distance), LABELS, strict=True))


def _swap(first: str, second: str):
    def answer(uninterrupted: list[float], resumed: dict[str, list[float]]) -> dict[str, str]:
        exchange = {first: second, second: first}
        right = which_resume(uninterrupted, resumed)
        return {name: exchange.get(label, label) for name, label in right.items()}

    return answer


def _resumes(rng: random.Random) -> list[tuple]:
    whole = [round(2 * 0.9**i, 3) for i in range(6)]
    runs = [whole, [round(x + 0.05, 3) for x in whole], [round(x + 1.5, 3) for x in whole]]
    names = rng.sample("ABC", 3)
    return [(whole, dict(sorted(zip(names, runs, strict=True))))]


LABELS = ("weights and optimizer", "weights only", "fresh start")


def _turn(by: int):
    def answer(uninterrupted: list[float], resumed: dict[str, list[float]]) -> dict[str, str]:
        right = which_resume(uninterrupted, resumed)
        return {name: LABELS[(LABELS.index(label) + by) % 3] for name, label in right.items()}

    return answer


WHICH_RESUME = Exercise(
    id="03.4",
    title="Which checkpoint was it?",
    kind="behaviour",
    answers="value",
    reference=which_resume,
    cases=_resumes,
    mutants={
        "optimizer forgotten": Mutant(
            _swap("weights and optimizer", "weights only"),
            "The other way round: without Adam's moments the first steps after the resume differ. "
            "The run that lies exactly on the uninterrupted one had both.",
        ),
        "fresh or weights": Mutant(
            _swap("weights only", "fresh start"),
            "A fresh start begins at the loss of the base model, far above. The one that strays "
            "only a little had the weights.",
        ),
        "all turned": Mutant(
            _swap("weights and optimizer", "fresh start"),
            "The run on top of the uninterrupted one did not start afresh, and the one that "
            "begins high up lost everything.",
        ),
        "none right": Mutant(
            _turn(1),
            "None of the three is right. Begin with the run that lies exactly on the "
            "uninterrupted one: it had both.",
        ),
        "none right, either": Mutant(
            _turn(2),
            "All three are wrong. Begin with the run that starts far above the others: it had "
            "nothing.",
        ),
    },
    properties=(
        Property(
            lambda answer, uninterrupted, resumed: (
                isinstance(answer, dict) and set(answer) == set(resumed)
            ),
            'Write a dictionary with the keys "A", "B" and "C": {"A": "...", "B": "...", '
            '"C": "..."}.',
        ),
        Property(
            lambda answer, uninterrupted, resumed: set(answer.values()) <= set(LABELS),
            "Use the three labels letter by letter as the cell gives them.",
        ),
        Property(
            lambda answer, uninterrupted, resumed: len(set(answer.values())) == 3,
            "Each of the three labels belongs to exactly one of the runs.",
        ),
    ),
    hints=(
        "One of the three lies exactly on the uninterrupted curve. What must it have kept?",
        "Adam remembers two moving averages per weight. Without them the next steps have another "
        "size.",
        "The run that starts at the loss of step 0 has kept nothing at all.",
    ),
    stub="""# a dictionary: "A", "B" and "C", each with one of these labels:
# "weights and optimizer", "weights only", "fresh start"
which_was_it = ...""",
)

EXERCISES = [WEIGHTED_NLL, BATCHES, SCHEDULE, WHICH_RESUME]
