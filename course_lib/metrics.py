"""What did a run measure, and how sure are we? The log of a run, and the numbers computed from it.

`MetricsLog` and `read_metrics` keep `metrics.jsonl`: one JSON object per line. The rest are pure
functions of lists: KL estimators, pass@k, bootstrap intervals. Logarithms are natural, so the unit
is the nat.

Sources: KL estimators, Schulman 2020, http://joschu.net/blog/kl-approx.html; pass@k, Chen et al.
2021, https://arxiv.org/abs/2107.03374, equation 1; bootstrap, Efron 1979.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from course_lib.errors import CourseError, naming

# --------------------------------------------------------------------------------------------------
# metrics.jsonl


class MetricsLog:
    """Appends to a `metrics.jsonl`, one line per call; a kill costs at most the last line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)

    def write(self, step: int, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Append one line, e.g. `write(3, {"reward/mean": 0.5}, phase="rl")`."""
        record = {"step": step, **(values or {}), **named}
        line = json.dumps(record, default=float)  # float: numpy and torch scalars
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")  # written in one piece when the file is closed


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """One dictionary per phase and step, in order of first appearance; later lines overwrite.

    So a run that was killed, resumed and did some steps twice reads like one that was not, and an
    evaluation logged after its step joins that step. A torn last line is skipped.
    """
    lines = _text(Path(path)).split("\n")
    torn = lines.pop()  # empty, unless the last write was cut short
    if _is_record(torn):
        lines.append(torn)  # complete but for its line end
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not _is_record(line):
            remedy = "delete the line: it is not one that MetricsLog wrote"
            raise CourseError(f"{path}:{number}", "not a JSON object with a step", remedy)
        record = json.loads(line)
        rows.setdefault((record.get("phase"), record["step"]), {}).update(record)
    return list(rows.values())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        remedy = "give the metrics.jsonl of a run"
        raise CourseError(str(path), error.strerror or "cannot be read", remedy) from error


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict) or not isinstance(record.get("phase"), str | None):
        return False
    return isinstance(record.get("step"), int | float)


def _drop_torn_line(path: Path) -> None:
    """Cut what a killed process left half-written: the next line must not be glued to it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        complete, newline, torn = file.read().rpartition(b"\n")
        if _is_record(torn.decode("utf-8", errors="replace")):
            file.write(b"\n")
        else:
            file.truncate(len(complete) + len(newline))


# --------------------------------------------------------------------------------------------------
# KL(target || reference), estimated on tokens sampled from the target
#
# r = p_reference / p_target. The other way round, k1's mean would be -KL, and k3's would be wrong.


def kl_k1(target_logprobs: Sequence[float], reference_logprobs: Sequence[float]) -> list[float]:
    """-log r per token: unbiased, often negative, noisy."""
    pairs = zip(target_logprobs, reference_logprobs, strict=True)
    return [target - reference for target, reference in pairs]


def kl_k2(target_logprobs: Sequence[float], reference_logprobs: Sequence[float]) -> list[float]:
    """(log r)^2 / 2 per token: never negative, biased, close when the two are close."""
    pairs = zip(target_logprobs, reference_logprobs, strict=True)
    return [(target - reference) ** 2 / 2 for target, reference in pairs]


def kl_k3(target_logprobs: Sequence[float], reference_logprobs: Sequence[float]) -> list[float]:
    """(r - 1) - log r per token: unbiased and never negative."""
    pairs = zip(target_logprobs, reference_logprobs, strict=True)
    # expm1, because r - 1 loses its digits exactly where training lives: at r close to 1.
    return [math.expm1(reference - target) - (reference - target) for target, reference in pairs]


# --------------------------------------------------------------------------------------------------
# pass@k and intervals


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of `k` samples is right, from `c` right ones among `n` samples.

    Unbiased, unlike 1 - (1 - c/n)^k: it counts the draws of k *different* samples.

    >>> pass_at_k(n=4, c=2, k=2)  # of the 6 pairs only one has both wrong
    0.8333333333333334
    """
    if not (0 <= c <= n and 1 <= k <= n):
        finding = f"n={n}, c={c}, k={k} do not fit together"
        raise CourseError("pass_at_k", finding, "use 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean: what other draws of as many values might give.

    Equal values give an interval of no width: the bootstrap cannot imagine what it has not seen.
    """
    import numpy as np

    if not len(values) or not 0 < level < 1:
        finding = f"{len(values)} values, level {level}"
        raise CourseError("bootstrap_interval", finding, "give values and a level between 0 and 1")
    values_N = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    n_resamples = 2000  # from seed to seed the ends move by about 0.02 of the width
    draws = (rng.integers(len(values_N), size=len(values_N)) for _ in range(n_resamples))
    means = [values_N[draw].mean() for draw in draws]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
