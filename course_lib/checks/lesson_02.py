"""Exercises of lesson 02: the LoRA layer, its size, the rank a change needs, the learning rate."""

from __future__ import annotations

import math
import random

from course_lib.checks.exercise import Exercise, Mutant, Property

Matrix = list[list[float]]


def times(matrix: Matrix, vector: list[float]) -> list[float]:
    """Matrix times vector, in plain Python."""
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def _add(left: list[float], right: list[float], factor: float = 1.0) -> list[float]:
    return [x + factor * y for x, y in zip(left, right, strict=True)]


def lora_forward(x: list[float], W: Matrix, A: Matrix, B: Matrix, alpha: float) -> list[float]:
    """W x + (alpha / r) B (A x); x (d_in,), W (d_out, d_in), A (r, d_in), B (d_out, r)."""
    rank = len(A)
    return _add(times(W, x), times(B, times(A, x)), alpha / rank)


def _numbers(rng: random.Random, *shape: int) -> list:
    if len(shape) == 1:
        return [round(rng.uniform(-2, 2), 1) for _ in range(shape[0])]
    return [_numbers(rng, *shape[1:]) for _ in range(shape[0])]


def _layers(rng: random.Random) -> list[tuple]:
    sizes = [(3, 4, 2), (4, 4, 3), (2, 2, 1)]
    layers = [
        (_numbers(rng, i), _numbers(rng, o, i), _numbers(rng, r, i), _numbers(rng, o, r), 8.0 * r)
        for i, o, r in sizes
    ]
    x, W, A, B, alpha = layers[0]
    return [*layers, (x, W, A, B, 5.0), (x, W, A, [[0.0] * len(A) for _ in B], alpha)]


LORA_LAYER = Exercise(
    id="02.1",
    title="The LoRA layer",
    kind="code",
    reference=lora_forward,
    cases=_layers,
    mutants={
        "alpha missing": Mutant(
            lambda x, W, A, B, alpha: _add(times(W, x), times(B, times(A, x))),
            "The scale is missing: alpha / r decides how loud the adapter is beside the frozen "
            "weight.",
        ),
        "not divided by r": Mutant(
            lambda x, W, A, B, alpha: _add(times(W, x), times(B, times(A, x)), alpha),
            "It is scaled by alpha alone. Divide by the rank, so that a larger rank does not "
            "mean a larger step.",
        ),
        "root of r": Mutant(
            lambda x, W, A, B, alpha: _add(
                times(W, x), times(B, times(A, x)), alpha / math.sqrt(len(A))
            ),
            "It divides by the root of r (that variant is called rsLoRA). This engine, like "
            "peft's default, divides by r.",
        ),
        "another rank": Mutant(
            lambda x, W, A, B, alpha: _add(times(W, x), times(B, times(A, x)), alpha / len(B)),
            "alpha is divided by the number of rows of B, which is d_out. The rank is the number "
            "of rows of A.",
        ),
        "the input's length": Mutant(
            lambda x, W, A, B, alpha: _add(times(W, x), times(B, times(A, x)), alpha / len(x)),
            "alpha is divided by the length of x, which is d_in. The rank is the number of rows "
            "of A.",
        ),
        "whole division": Mutant(
            lambda x, W, A, B, alpha: _add(times(W, x), times(B, times(A, x)), alpha // len(A)),
            "`//` cuts off what is behind the point: 5 // 2 is 2. Use `/`.",
        ),
        "alpha of 32": Mutant(
            lambda x, W, A, B, alpha: _add(times(W, x), times(B, times(A, x)), 32 / len(A)),
            "It always takes 32. Use the alpha that it is given.",
        ),
        "scales W, too": Mutant(
            lambda x, W, A, B, alpha: [
                alpha / len(A) * y for y in _add(times(W, x), times(B, times(A, x)))
            ],
            "The frozen path is scaled as well. alpha / r belongs to the adapter's path alone.",
        ),
        "replaces W": Mutant(
            lambda x, W, A, B, alpha: [alpha / len(A) * y for y in times(B, times(A, x))],
            "The frozen weight is gone: with B = 0 your layer gives zeros, and it should give "
            "exactly W x.",
        ),
        "one matrix only": Mutant(
            lambda x, W, A, B, alpha: _add(
                times(W, x), _padded(times(A, x), len(W)), alpha / len(A)
            ),
            "Only A is applied. A takes x down to r numbers, B takes them up to d_out: B (A x).",
        ),
    },
    properties=(
        Property(
            lambda f, x, W, A, B, alpha: len(f(x, W, A, B, alpha)) == len(W),
            "The result must have one number per row of W.",
        ),
    ),
    hints=(
        "There are two paths from x to the output, and their results are added.",
        "The adapter's path goes down to r numbers first (A), then up again (B). `times(M, v)` "
        "multiplies.",
        "The adapter's path is scaled by alpha over r, and r is the number of rows of A.",
    ),
    stub='''def lora_forward(x, W, A, B, alpha):
    """x (d_in,), W (d_out, d_in), A (r, d_in), B (d_out, r), all plain lists; gives (d_out,)."""
    return ...''',
)


def _padded(values: list[float], length: int) -> list[float]:
    return (values + [0.0] * length)[:length]


def lora_parameters(d_in: int, d_out: int, rank: int) -> int:
    """Trainable numbers in one adapted layer."""
    return rank * (d_in + d_out)


LORA_SIZE = Exercise(
    id="02.2",
    title="Count what is trained",
    kind="code",
    reference=lora_parameters,
    cases=lambda rng: [
        (rng.choice([64, 192, 4096]), rng.choice([128, 512, 14336]), r) for r in (1, 8, 32)
    ],
    mutants={
        "the full matrix": Mutant(
            lambda d_in, d_out, rank: d_in * d_out,
            "That is the full weight, which stays frozen. Count A and B.",
        ),
        "a product": Mutant(
            lambda d_in, d_out, rank: rank * d_in * d_out,
            "That multiplies the two sides. A has r x d_in numbers and B has d_out x r; they are "
            "added.",
        ),
        "frozen included": Mutant(
            lambda d_in, d_out, rank: rank * (d_in + d_out) + d_in * d_out,
            "That counts the frozen weight as well. Trainable are A and B only.",
        ),
        "one side": Mutant(
            lambda d_in, d_out, rank: rank * d_in,
            "That is A alone. B has numbers, too.",
        ),
        "the other side": Mutant(
            lambda d_in, d_out, rank: rank * d_out,
            "That is B alone. A has numbers, too.",
        ),
        "twice the same": Mutant(
            lambda d_in, d_out, rank: 2 * rank * d_in,
            "A and B are counted as if both were as long as the input. B has d_out rows.",
        ),
        "a share": Mutant(
            lambda d_in, d_out, rank: rank * (d_in + d_out) / (d_in * d_out),
            "That is the share of the full matrix. Give the count.",
        ),
        "shapes multiplied": Mutant(
            lambda d_in, d_out, rank: rank * d_in * rank * d_out,
            "The counts of A and B are multiplied. Two matrices side by side: add.",
        ),
    },
    hints=(
        "How many numbers has A? How many has B?",
        "A has one row per rank and one column per input; B has one row per output and one "
        "column per rank.",
        "Add the two counts. The rank can be taken out as a factor.",
    ),
    stub='''def lora_parameters(d_in, d_out, rank):
    """Trainable numbers of a LoRA adapter on a (d_out, d_in) weight."""
    return ...''',
)


def rank_needed(singular_values: list[float], share: float) -> int:
    """The smallest rank that keeps `share` of the energy (sum of squared singular values)."""
    energies = [value**2 for value in sorted(singular_values, reverse=True)]
    kept = 0.0
    for rank, energy in enumerate(energies, start=1):
        kept += energy
        if kept >= share * sum(energies) - 1e-12:
            return rank
    return len(energies)


def _rank_by(power: int, extra: int = 0):
    def rank(singular_values: list[float], share: float) -> int:
        values = [value**power for value in sorted(singular_values, reverse=True)]
        kept = [sum(values[: r + 1]) for r in range(len(values))]
        return (
            next(r for r, k in enumerate(kept, start=1) if k >= share * sum(values) - 1e-12) + extra
        )

    return rank


def _spectra(rng: random.Random) -> list[tuple]:
    decays = [rng.uniform(0.5, 0.8) for _ in range(3)]
    falling = [
        ([round(10 * d**i, 3) for i in range(10)], share) for d in decays for share in (0.8, 0.95)
    ]
    rising = falling[0][0][::-1]
    even = [1.0, 1.0, 1.0, 1.0]
    return [*falling, (even, 0.5), (even, 0.9), ([3.0, *[1.0] * 9], 0.9), (rising, 0.8)]


def _until(share_of_kept, singular_values: list[float]) -> int:
    """The first rank whose kept energy passes the test."""
    energies = [value**2 for value in singular_values]
    return next(r for r in range(1, len(energies) + 1) if share_of_kept(sum(energies[:r])))


RANK_NEEDED = Exercise(
    id="02.3",
    title="How much rank does a change need?",
    kind="code",
    reference=rank_needed,
    cases=_spectra,
    mutants={
        "not squared": Mutant(
            _rank_by(1),
            "It adds singular values. Energy is their squares: large ones count for much more, "
            "so less rank is needed.",
        ),
        "one too many": Mutant(
            _rank_by(2, 1),
            "One too many: the rank that first reaches the share is enough.",
        ),
        "one too few": Mutant(
            _rank_by(2, -1),
            "One too few: that rank stays just below the share. Ranks are counted from 1.",
        ),
        "unsorted": Mutant(
            lambda s, share: _until(lambda kept: kept >= share * sum(x**2 for x in s) - 1e-12, s),
            "It takes the singular values in the order in which they come. The largest count "
            "first: sort.",
        ),
        "more than the share": Mutant(
            lambda s, share: _until(
                lambda kept: kept > share * sum(x**2 for x in s), sorted(s, reverse=True)
            ),
            "A rank that holds the share exactly is enough: compare with >=, not with >.",
        ),
        "square of the sum": Mutant(
            lambda s, share: next(
                r
                for r in range(1, len(s) + 1)
                if sum(sorted(s, reverse=True)[:r]) ** 2 >= share * sum(s) ** 2 - 1e-12
            ),
            "It squares the sum. Square each singular value, then add.",
        ),
        "share of the count": Mutant(
            lambda s, share: math.ceil(share * len(s)),
            "It takes a share of the number of singular values. Their sizes differ: add up their "
            "squares.",
        ),
    },
    hints=(
        "Squared singular values add up to the squared size of the whole matrix. Each rank keeps "
        "one more of them.",
        "Go through them from the largest, keep a running sum, and stop as soon as it reaches "
        "the share.",
        "Compare the running sum of squares with share times the total of squares; the count so "
        "far is the rank.",
    ),
    stub='''def rank_needed(singular_values, share):
    """The smallest rank whose largest singular values hold `share` of the sum of squares."""
    return ...''',
)


def pick_learning_rate(sweep: dict[float, tuple[float, float]]) -> float:
    """The rate with the lowest held-out loss among runs that did not blow up."""
    finished = {rate: losses[1] for rate, losses in sweep.items() if math.isfinite(losses[1])}
    return min(finished, key=lambda rate: finished[rate])


def _sweeps(rng: random.Random) -> list[tuple]:
    sweeps = []
    for best in (1, 2, 1, 2):
        heldout = [1.0 + abs(i - best) * rng.uniform(0.3, 0.6) for i in range(4)]
        train = [0.5 + abs(i - best - 1) * 0.4 for i in range(4)]  # lowest one rate further up
        rates = [3e-5, 3e-4, 3e-3, 1e-2]
        sweep = {
            r: (round(t, 3), round(h, 3)) for r, t, h in zip(rates, train, heldout, strict=True)
        }
        sweeps.append(({0.1: (math.nan, math.nan), **sweep},))
    learned_by_heart = {1e-4: (1.9, 1.5), 1e-3: (1.0, 0.9), 1e-2: (0.2, 1.3)}
    return [*sweeps, ({0.1: (math.nan, math.nan), **learned_by_heart},)]


PICK_RATE = Exercise(
    id="02.4",
    title="Pick the learning rate from the sweep",
    kind="behaviour",
    reference=pick_learning_rate,
    cases=_sweeps,
    mutants={
        "training loss": Mutant(
            lambda sweep: min(
                (r for r in sweep if math.isfinite(sweep[r][0])), key=lambda r: sweep[r][0]
            ),
            "That is the lowest training loss. It falls even while the model memorises: choose "
            "by the held-out loss.",
        ),
        "nan wins": Mutant(
            lambda sweep: min(sweep, key=lambda rate: sweep[rate][1]),
            "A run that blew up was chosen: no loss is less than nan, so min() keeps it. Leave nan "
            "out first; math.isfinite tells (x != nan is true of every x).",
        ),
        "the sum": Mutant(
            lambda sweep: min(
                (r for r in sweep if math.isfinite(sum(sweep[r]))), key=lambda r: sum(sweep[r])
            ),
            "It adds the two losses. The training loss has no say: it falls even while the model "
            "memorises.",
        ),
        "the loss": Mutant(
            lambda sweep: sweep[pick_learning_rate(sweep)][1],
            "That is the lowest held-out loss. Give the rate that reached it.",
        ),
        "highest": Mutant(
            lambda sweep: max(
                (r for r in sweep if math.isfinite(sweep[r][1])), key=lambda r: sweep[r][1]
            ),
            "That rate has the highest held-out loss. A lower loss is better: min, not max.",
        ),
        "largest": Mutant(
            lambda sweep: max(r for r in sweep if math.isfinite(sweep[r][1])),
            "That is the largest rate that did not blow up. Largest is not best: look at the "
            "held-out loss.",
        ),
        "smallest": Mutant(
            lambda sweep: min(sweep),
            "That is the smallest rate. It is safe, and it has hardly learned anything.",
        ),
    },
    hints=(
        "Which of the two losses tells how the model does on text it has not seen?",
        "Some runs end in nan. math.isfinite tells them apart; leave them out before you compare.",
        "min() takes a key: a function that gives, for a rate, the number to compare by.",
    ),
    stub='''def pick_learning_rate(sweep):
    """sweep: rate -> (training loss, held-out loss), some of them nan; gives the best rate."""
    return ...''',
)

EXERCISES = [LORA_LAYER, LORA_SIZE, RANK_NEEDED, PICK_RATE]
