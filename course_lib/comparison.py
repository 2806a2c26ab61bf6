"""Is this model better than that one, or was it luck? Comparisons of evaluations on the same
problems.

Two accuracies with overlapping intervals can still differ for certain: the problems are the same,
so what counts are the problems on which the two disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from course_lib.errors import CourseError
from course_lib.evaluation import Evaluation, Record
from course_lib.metrics import bootstrap_interval, pass_at_k


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % bootstrap interval."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """`after` minus `before` on the same problems."""

    difference: float  # of accuracies
    interval: tuple[float, float]  # 95 %, bootstrap over the paired differences
    better: int  # problems on which `after` is right more often
    worse: int
    p_value: float  # exact sign test: how often luck alone splits the disagreements so unevenly

    def __str__(self) -> str:
        low, high = (100 * limit for limit in self.interval)
        # Where few problems disagree, the bootstrap is too sure.
        lucky = low <= 0 <= high or self.p_value > 0.05
        verdict = "could be luck" if lucky else "is hardly luck"
        return (
            f"{100 * self.difference:+.1f} points [{low:+.1f}, {high:+.1f}], "
            f"{self.better} problems better, {self.worse} worse, p = {self.p_value:.2g}: {verdict}"
        )


def pass_at(evaluation: Evaluation, k: int) -> Estimate:
    """The chance that one of k completions is right, unbiased (Chen et al. 2021), over problems."""
    _check_gradable(evaluation)
    values = [
        pass_at_k(len(each.correct), int(sum(each.correct)), k) for each in evaluation.records
    ]
    return Estimate(sum(values) / len(values), bootstrap_interval(values))


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """The paired difference of two models on the same problems."""
    differences = [_share_right(new) - _share_right(old) for old, new in _paired(before, after)]
    better = sum(each > 0 for each in differences)
    worse = sum(each < 0 for each in differences)
    mean = sum(differences) / len(differences)
    return Comparison(
        mean, bootstrap_interval(differences), better, worse, sign_test(better, worse)
    )


def sign_test(better: int, worse: int) -> float:
    """The chance that a fair coin splits the disagreements at least so unevenly (two-sided, exact).

    >>> sign_test(5, 0)  # 2 of the 32 ways
    0.0625
    """
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def _paired(before: Evaluation, after: Evaluation) -> list[tuple[Record, Record]]:
    _check_gradable(before)
    _check_gradable(after)
    if [each.id for each in before.records] != [each.id for each in after.records]:
        remedy = "evaluate both models on one list of problems"
        raise CourseError("compare", "the two evaluations are of different problems", remedy)
    return list(zip(before.records, after.records, strict=True))


def _share_right(record: Record) -> float:
    return sum(record.correct) / len(record.correct)


def _check_gradable(evaluation: Evaluation) -> None:
    if evaluation.accuracy is None:
        raise CourseError("evaluation", "has no verdicts", "use problems with answers to check")
