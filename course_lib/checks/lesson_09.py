"""Exercises of lesson 09: the merge, the merge's test, the model card, the key at the door."""

from __future__ import annotations

import hmac
import random
import re

from course_lib.checks.compare import close
from course_lib.checks.exercise import Exercise, Mutant, Property

Matrix = list[list[float]]


def merge(W: Matrix, A: Matrix, B: Matrix, alpha: float) -> Matrix:
    """W + (alpha / r) B A; W (d_out, d_in), A (r, d_in), B (d_out, r)."""
    return _merge(W, A, B, alpha / len(A))


def _merge(W: Matrix, A: Matrix, B: Matrix, scale: float) -> Matrix:
    return [
        [
            w + scale * sum(b * a[column] for b, a in zip(b_row, A, strict=True))
            for column, w in enumerate(w_row)
        ]
        for w_row, b_row in zip(W, B, strict=True)
    ]


def _transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def _product_turned(W: Matrix, A: Matrix, B: Matrix, alpha: float) -> Matrix:
    zero = [[0.0] * len(W) for _ in W[0]]
    turned = _transposed(_merge(_transposed(zero), A, B, alpha / len(A)))
    return [
        [w + d for w, d in zip(row, delta, strict=True)]
        for row, delta in zip(W, turned, strict=True)
    ]


def _holds_when_tall(f, W: Matrix, A: Matrix, B: Matrix, alpha: float) -> bool:
    """Whether an answer that is right for this square weight is right with one more output."""

    def right(W: Matrix, B: Matrix) -> bool:
        given = ([list(row) for row in W], A, [list(row) for row in B], alpha)
        return close(f(*given), merge(W, A, B, alpha))

    return not right(W, B) or right([*W, W[0]], [*B, B[0]])


def _matrices(rng: random.Random) -> list[tuple]:
    def matrix(rows: int, columns: int) -> Matrix:
        return [[round(rng.uniform(-2, 2), 1) for _ in range(columns)] for _ in range(rows)]

    return [(matrix(n, n), matrix(r, n), matrix(n, r), 8.0) for n, r in ((2, 1), (3, 2), (4, 3))]


MERGE = Exercise(
    id="09.1",
    title="Merge an adapter",
    kind="code",
    reference=merge,
    cases=_matrices,
    mutants={
        "no scale": Mutant(
            lambda W, A, B, alpha: _merge(W, A, B, 1.0),
            "The scale alpha / r is missing. The merged model answers, only not like the one you "
            "trained.",
        ),
        "alpha alone": Mutant(
            lambda W, A, B, alpha: _merge(W, A, B, alpha),
            "It is scaled by alpha and not divided by the rank: the change is r times too large.",
        ),
        "transposed": Mutant(
            _product_turned,
            "The change is transposed. On a square matrix nothing complains, and the model is "
            "ruined: B A, outputs down, inputs across.",
        ),
        "subtracted": Mutant(
            lambda W, A, B, alpha: _merge(W, A, B, -alpha / len(A)),
            "The change is subtracted: that undoes the training twice over.",
        ),
        "change only": Mutant(
            lambda W, A, B, alpha: [
                [m - w for m, w in zip(x, y, strict=True)]
                for x, y in zip(merge(W, A, B, alpha), W, strict=True)
            ],
            "That is the change alone. The merged weight is the frozen one plus the change.",
        ),
        "width for rank": Mutant(
            lambda W, A, B, alpha: _merge(W, A, B, alpha / len(B)),
            "It divides by the width of the layer. The rank is the narrow side: the rows of A, the "
            "columns of B.",
        ),
    },
    properties=(
        Property(
            _holds_when_tall,
            "It is right for square weights only. W has d_out rows and d_in columns, and they may "
            "differ.",
        ),
    ),
    hints=(
        "After the merge there is one matrix that does what two paths did before.",
        "Entry (i, j) of the product B A is the sum over the rank of B[i][k] times A[k][j].",
        "Scale it by alpha over the number of rows of A, and add it to W[i][j].",
    ),
    stub='''def merge(W, A, B, alpha):
    """W (d_out, d_in), A (r, d_in), B (d_out, r), lists of rows; gives the merged weight."""
    return ...''',
)


def merge_is_good(
    base: list[float], adapted: list[float], merged: list[float], tolerance: float
) -> bool:
    """Merged logits must equal the adapter's, and the adapter must differ from the base."""
    return _apart(merged, adapted) <= tolerance < _apart(adapted, base)


def _apart(left: list[float], right: list[float]) -> float:
    """The largest distance of two logits."""
    return max(abs(x - y) for x, y in zip(left, right, strict=True))


def _above(left: list[float], right: list[float]) -> float:
    """The same, but blind to what is below."""
    return max(x - y for x, y in zip(left, right, strict=True))


def _logits(rng: random.Random) -> list[tuple]:
    base = [round(rng.uniform(-3, 3), 2) for _ in range(5)]
    adapted = [round(x - rng.uniform(0.3, 1), 2) for x in base]  # an adapter that only lowers
    one_off = [*adapted[:-1], adapted[-1] + 0.0015]
    high = [x + 0.5 for x in adapted]
    low = [x - 9 * (x == max(adapted)) for x in adapted]  # another token is now the likeliest
    hardly = [x + 1e-5 for x in base]  # one whose effect is lost in the rounding
    rough = [x + 8e-4 for x in adapted]  # each logit within the tolerance, their sum beyond it
    partly = [base[0], *(x + 0.5 for x in base[1:])]  # one that only raises, and not all
    merges = (adapted, rough, base, one_off, high, low)
    return [(base, adapted, m, 1e-3) for m in merges] + [
        (base, base, base, 1e-3),
        (base, base, adapted, 1e-3),
        (base, hardly, hardly, 1e-3),
        (base, partly, partly, 1e-3),
    ]


MERGE_TEST = Exercise(
    id="09.2",
    title="Was the merge right?",
    kind="behaviour",
    reference=merge_is_good,
    cases=_logits,
    mutants={
        "changed is enough": Mutant(
            lambda base, adapted, merged, tolerance: _apart(merged, base) > tolerance,
            "It only asks whether the merged model differs from the base. A merge with the wrong "
            "scale differs, too.",
        ),
        "forgets the base": Mutant(
            lambda base, adapted, merged, tolerance: _apart(merged, adapted) <= tolerance,
            "An adapter that does nothing passes: then base, adapter and merged model are all "
            "the same, and the test has tested nothing.",
        ),
        "mean difference": Mutant(
            lambda base, adapted, merged, tolerance: (
                sum(abs(m - a) for m, a in zip(merged, adapted, strict=True)) / len(merged)
                <= tolerance
                and _apart(adapted, base) > tolerance
            ),
            "It lets a single wrong logit through. Take the largest difference, not a mean: one "
            "token is enough to change an answer.",
        ),
        "added up": Mutant(
            lambda base, adapted, merged, tolerance: (
                sum(abs(m - a) for m, a in zip(merged, adapted, strict=True))
                <= tolerance
                < _apart(adapted, base)
            ),
            "It adds the differences up. Rounding in every logit then refuses a good merge, the "
            "sooner the larger the vocabulary. Take the largest.",
        ),
        "every logit must move": Mutant(
            lambda base, adapted, merged, tolerance: (
                _apart(merged, adapted) <= tolerance
                and min(abs(x - y) for x, y in zip(adapted, base, strict=True)) > tolerance
            ),
            "It asks that every logit moved away from the base. Training may leave some as they "
            "were: the largest difference must exceed the tolerance.",
        ),
        "exact": Mutant(
            lambda base, adapted, merged, tolerance: merged == adapted and adapted != base,
            "It demands equality to the last bit. Merged weights are added in another order: "
            "allow the tolerance.",
        ),
        "one direction": Mutant(
            lambda base, adapted, merged, tolerance: (
                _above(merged, adapted) <= tolerance < _apart(adapted, base)
            ),
            "Logits that are too low pass. Take absolute values.",
        ),
        "other direction": Mutant(
            lambda base, adapted, merged, tolerance: (
                _above(adapted, merged) <= tolerance < _apart(adapted, base)
            ),
            "Logits that are too high pass. Take absolute values.",
        ),
        "only raised": Mutant(
            lambda base, adapted, merged, tolerance: (
                _apart(merged, adapted) <= tolerance < _above(adapted, base)
            ),
            "An adapter that only lowers logits counts as one that does nothing. Take absolute "
            "values there, too.",
        ),
        "either will do": Mutant(
            lambda base, adapted, merged, tolerance: (
                _apart(merged, adapted) <= tolerance or _apart(adapted, base) > tolerance
            ),
            "One of the two conditions is enough for it. Both must hold.",
        ),
        "same best token": Mutant(
            lambda base, adapted, merged, tolerance: (
                adapted.index(max(adapted)) == merged.index(max(merged))
            ),
            "It compares the likeliest token only. A wrong merge often agrees on that; compare "
            "every logit.",
        ),
        "any difference from the base": Mutant(
            lambda base, adapted, merged, tolerance: (
                _apart(merged, adapted) <= tolerance and merged != base
            ),
            "A difference from the base as small as rounding counts as training. It must be larger "
            "than the tolerance.",
        ),
    },
    hints=(
        "Three models, two comparisons: which two must agree, and which two must not?",
        "Compare by the largest absolute difference between two lists of logits.",
        "Both must hold: merged against adapted within the tolerance, adapted against base "
        "beyond it.",
    ),
    stub='''def merge_is_good(base, adapted, merged, tolerance):
    """Logits of the three models on the same prompt; True if the merge can be shipped."""
    return ...''',
)


def model_card(name: str, base_model: str, licence: str, accuracy: float, problems: int) -> str:
    """A model card: front matter for machines, then what it is, how good, and what it cannot do."""
    return f"""---
base_model: {base_model}
license: {licence}
tags: [lora, grpo]
---
# {name}

Trained on sums of two-digit numbers, from {base_model}: LoRA, SFT, then GRPO.

## Evaluation

{accuracy:.1%} of {problems} held-out problems, answered greedily.

## Limitations

Only such sums were measured. Do not ask it anything else.
"""


def _front_matter(card: str) -> list[str]:
    first, *lines = card.splitlines() or [""]
    return lines[: lines.index("---")] if first == "---" and "---" in lines else []


NO_TEXT = "It does not give a string. The card is one text: front matter, then Markdown."
NO_FRONT = (
    "There is no front matter: the card must begin with a line `---`, some `key: value` lines, "
    "and a line `---`. Hubs read nothing else."
)
INDENTED = (
    "A line `---` has spaces before its dashes: text that is indented like the function's body "
    "keeps them, and hubs then find no front matter. Let the dashes begin their lines."
)
NO_BASE = (
    "The front matter does not say base_model, or not the one that was given: without it nobody "
    "knows which weights the adapter belongs to."
)
NO_LICENCE = (
    "The front matter has no license (spelled so), or not the one that was given: without one "
    "nobody may use the model."
)
NO_NAME = "The model's name is missing: put the argument `name` into the card, as its title."
NO_NUMBERS = (
    "The accuracy (as a percentage) and the number of problems are missing: a claim needs both."
)
NO_LIMITS = (
    "There is no section on limitations, or nothing stands in it. What was not measured has to be "
    "said, too."
)


NO_TRAINING = (
    "It does not say what the model was trained on. A sentence will do: how it was fine-tuned, and "
    "on what."
)


def _at_the_margin(f, *case) -> bool:
    card = f(*case)
    dashes = [line for line in card.splitlines() if line.strip() == "---"]
    return bool(_front_matter(card)) or all(line.startswith("---") for line in dashes)


def _has_key(key: str, position: int):
    def holds(f, *case) -> bool:
        lines = (line.split(" #")[0] for line in _front_matter(f(*case)))  # without its comment
        said = [line.replace('"', "").replace("'", "").split() for line in lines]
        return [f"{key}:", case[position]] in said

    return holds


def _has_numbers(f, name, base_model, licence, accuracy, problems) -> bool:
    text = f(name, base_model, licence, accuracy, problems)
    written = re.findall(r"(\d+(?:\.\d+)?)\**\s*(?:%|per ?cent)", text)
    per_cents = [float(number) for number in written]
    return (
        any(abs(number - 100 * accuracy) <= 0.5 for number in per_cents)
        and re.search(rf"\b{problems}\b", text) is not None
    )


def _says_training(f, name, *case) -> bool:
    prose = f(name, *case).split("---", 2)[-1].replace(name, "")  # which may well say "lora"
    return re.search(r"train|tun(?:e|ing)|\bLoRA\b|\bSFT\b|\bGRPO\b", prose, re.I) is not None


def _has_limits(f, *case) -> bool:
    found = re.search(r"\blimit\w*(.*)", f(*case), re.IGNORECASE | re.DOTALL)
    return found is not None and len(re.findall(r"\w+", found[1])) >= 2


def _without_training(*case):
    card = model_card(*case)
    return "\n".join(line for line in card.splitlines() if not line.startswith("Trained on"))


MODEL_CARD = Exercise(
    id="09.4",
    title="A model card that says enough",
    kind="artefact",
    reference=model_card,
    same=None,
    cases=lambda rng: [
        (
            f"sums-lora-{rng.randrange(100)}",
            base_model,
            licence,
            rng.choice([0.42, 0.9, 0.95]),
            rng.choice([200, 500]),
        )
        for base_model, licence in (("course/base", "mit"), ("ada/river-1b", "apache-2.0"))
    ],
    properties=(
        Property(lambda f, *case: isinstance(f(*case), str), NO_TEXT),
        Property(_at_the_margin, INDENTED),
        Property(lambda f, *case: bool(_front_matter(f(*case))), NO_FRONT),
        Property(_has_key("base_model", 1), NO_BASE),
        Property(_has_key("license", 2), NO_LICENCE),
        Property(lambda f, name, *case: name in f(name, *case), NO_NAME),
        Property(_has_numbers, NO_NUMBERS),
        Property(_has_limits, NO_LIMITS),
        Property(_says_training, NO_TRAINING),
    ),
    mutants={
        "prose only": Mutant(lambda *case: model_card(*case).split("---\n", 2)[2], NO_FRONT),
        "indented": Mutant(
            lambda *case: model_card(*case).replace("\n", "\n    "),  # as the function's body is
            INDENTED,
        ),
        "no base": Mutant(
            lambda *case: model_card(*case).replace("base_model: ", "model: "), NO_BASE
        ),
        "licence misspelt": Mutant(
            lambda *case: model_card(*case).replace("license:", "licence:"), NO_LICENCE
        ),
        "no text": Mutant(lambda *case: model_card(*case).splitlines(), NO_TEXT),
        "no name": Mutant(lambda name, *case: model_card("My model", *case), NO_NAME),
        "no numbers": Mutant(
            lambda name, base, licence, accuracy, problems: model_card(
                name, base, licence, 1.23456, 0
            ),
            NO_NUMBERS,
        ),
        "no limits": Mutant(lambda *case: model_card(*case).split("## Limitations")[0], NO_LIMITS),
        "no training": Mutant(_without_training, NO_TRAINING),
    },
    hints=(
        "A card has two readers: a machine, which reads the front matter, and a person, who "
        "reads the rest.",
        "The front matter stands between two lines of three dashes at the very beginning, one "
        "`key: value` per line.",
        "Then Markdown: what it is and what it was trained on, an evaluation with accuracy and "
        "number of problems, and a section on limitations.",
    ),
    stub='''def model_card(name, base_model, licence, accuracy, problems):
    """Markdown: front matter (base_model, license), evaluation, limitations; accuracy 0..1."""
    return ...''',
)


def authorised(headers: dict[str, str], key: str) -> bool:
    """Whether a request carries `Authorization: Bearer <key>`; header names have no case."""
    lowered = {name.lower(): value for name, value in headers.items()}
    sent = lowered.get("authorization", "")
    return bool(key) and hmac.compare_digest(sent.encode(), f"Bearer {key}".encode())


def _requests(rng: random.Random) -> list[tuple]:
    key = f"sk-{rng.randrange(10**6):06d}"
    return [
        ({"Authorization": f"Bearer {key}"}, key),
        ({"authorization": f"Bearer {key}", "accept": "*/*"}, key),
        ({"AUTHORIZATION": f"Bearer {key}"}, key),
        ({"Authorization": f"Basic {key}"}, key),
        ({"Authorization": f"Bearer {key}x"}, key),
        ({"Authorization": f"Bearer {key[:-1]}"}, key),
        ({"Authorization": f"Bearer {key.upper()}"}, key),
        ({"Authorization": f"Bearer {key}\N{LATIN SMALL LETTER O WITH DIAERESIS}"}, key),
        ({"Authorization": key}, key),
        ({"Authorization": f"Bearer x{key}"}, key),
        ({"X-Note": f"Bearer {key}"}, key),
        ({"Authorization": "Bearer "}, key),
        ({"Authorization": "Bearer "}, ""),
        ({}, key),
    ]


def _looks_for(test):
    def allowed(headers: dict[str, str], key: str) -> bool:
        lowered = {name.lower(): value for name, value in headers.items()}
        return test(lowered.get("authorization"), key)

    return allowed


AUTHORISED = Exercise(
    id="09.3",
    title="The key at the door",
    kind="code",
    reference=authorised,
    cases=_requests,
    mutants={
        "starts with": Mutant(
            _looks_for(lambda got, key: bool(key) and (got or "").startswith(f"Bearer {key}")),
            "A key with something after it gets in. Compare the whole value.",
        ),
        "begun is enough": Mutant(
            _looks_for(
                lambda got, key: bool(got) and bool(key) and f"Bearer {key}".startswith(got)
            ),
            "The beginning of a key gets in. Compare the whole value.",
        ),
        "end is enough": Mutant(
            _looks_for(
                lambda got, key: (
                    bool(key) and (got or "").startswith("Bearer ") and (got or "").endswith(key)
                )
            ),
            "A key with something before it gets in. Compare the whole value.",
        ),
        "any header": Mutant(
            lambda headers, key: bool(key) and f"Bearer {key}" in headers.values(),
            "It takes the key from any header. Only `Authorization` is the door.",
        ),
        "empty key": Mutant(
            _looks_for(lambda got, key: got == f"Bearer {key}"),
            "With an empty key on the server everybody gets in who sends an empty one. Refuse "
            "until a key is set.",
        ),
        "case of the name": Mutant(
            lambda headers, key: bool(key) and headers.get("Authorization") == f"Bearer {key}",
            "It knows only one spelling of the header's name; HTTP header names have no case.",
        ),
        "case of the name, and empty key": Mutant(
            lambda headers, key: headers.get("Authorization") == f"Bearer {key}",
            "Two things. HTTP header names have no case, and it knows a single spelling. And as "
            "long as no key is set on the server, whoever sends an empty one gets in.",
        ),
        "lower case only": Mutant(
            lambda headers, key: bool(key) and headers.get("authorization") == f"Bearer {key}",
            "It looks for the header's name in lower case only. Lower the names that came in "
            "first: HTTP header names have no case.",
        ),
        "two spellings": Mutant(
            lambda headers, key: (
                bool(key)
                and f"Bearer {key}" in (headers.get("Authorization"), headers.get("authorization"))
            ),
            "It knows two spellings of the header's name. There are many, AUTHORIZATION among "
            "them: lower the names that came in first.",
        ),
        "any scheme": Mutant(
            _looks_for(lambda got, key: bool(key) and (got or "").split()[1:] == [key]),
            "It looks at the second word only, so any scheme before the key will do. Compare the "
            "whole value.",
        ),
        "key in any case": Mutant(
            _looks_for(
                lambda got, key: bool(key) and (got or "").lower() == f"Bearer {key}".lower()
            ),
            "The key gets in with other capitals. Header names have no case, but a key has.",
        ),
        "only ASCII": Mutant(
            _looks_for(
                lambda got, key: bool(key) and hmac.compare_digest(got or "", f"Bearer {key}")
            ),
            "A header with a letter beyond ASCII stops it with a TypeError: hmac.compare_digest "
            "takes no such text. Compare bytes: .encode() both.",
        ),
        "no scheme": Mutant(
            _looks_for(lambda got, key: bool(key) and (got or "").removeprefix("Bearer ") == key),
            "A key without the word Bearer gets in. Clients would come to rely on it; ask for "
            "the scheme.",
        ),
    },
    hints=(
        "There is exactly one right value. Everything else is refused, the empty key included.",
        'Lower the header names first. Then compare the whole value with "Bearer " and the key.',
        "hmac.compare_digest compares two values in a time that does not tell how much of them "
        "agrees. Give it bytes (.encode()): text it takes only if it is ASCII.",
    ),
    stub='''def authorised(headers, key):
    """True only for `Authorization: Bearer <key>` with this very key, which must not be empty."""
    return ...''',
)

EXERCISES = [MERGE, MERGE_TEST, AUTHORISED, MODEL_CARD]
