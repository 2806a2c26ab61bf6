"""Claims about course_lib.metrics: a log that survives a kill, estimators held to exact values."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.errors import CourseError
from course_lib.metrics import (
    MetricsLog,
    bootstrap_interval,
    kl_k1,
    kl_k2,
    kl_k3,
    pass_at_k,
    read_metrics,
)

# --------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write(1, {"loss:sum": 2.5}, phase="sft")
    log.write(2, {"loss:sum": 1.5}, phase="sft")
    assert read_metrics(log.path) == [
        {"step": 1, "loss:sum": 2.5, "phase": "sft"},
        {"step": 2, "loss:sum": 1.5, "phase": "sft"},
    ]


def test_numpy_and_torch_scalars_are_numbers_in_the_log(tmp_path: Path) -> None:
    import torch

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, a=np.float32(0.5), b=torch.tensor(0.25))
    assert read_metrics(log.path) == [{"step": 1, "a": 0.5, "b": 0.25}]


def test_a_diverged_loss_stays_visible(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, loss=math.nan)
    assert math.isnan(read_metrics(log.path)[0]["loss"])


def test_every_prefix_of_a_log_can_be_read_and_continued(tmp_path: Path) -> None:
    """A kill may stop the file at any byte: whole steps survive, the next is not glued on."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2):
        log.write(step, loss=step / 10)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        survived = [row["step"] for row in read_metrics(path)]
        assert survived in ([], [1], [1, 2])
        MetricsLog(path).write(9, loss=0.9)
        assert [row["step"] for row in read_metrics(path)] == [*survived, 9]


def test_a_log_survives_kill_9_of_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from course_lib.metrics import MetricsLog; log = MetricsLog(sys.argv[1])\n"
        "step = 0\n"
        "while True:\n    step += 1; log.write(step, text='x' * 5000); print(step, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer.stdout:
        seen = [int(writer.stdout.readline()) for _ in range(20)][-1]
        writer.kill()
        writer.wait(timeout=30)
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= seen


def test_steps_done_again_after_a_resume_replace_the_first_ones(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.write(step, loss=1.0, phase="rl")
    resumed = MetricsLog(log.path)
    for step in (2, 3):
        resumed.write(step, loss=0.5, phase="rl")
    assert [(row["step"], row["loss"]) for row in read_metrics(log.path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.5),
    ]


def test_an_evaluation_joins_its_step_and_phases_stay_apart(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, loss=1.0, phase="sft")
    log.write(1, reward=0.5, phase="rl")
    log.write(1, nll=0.7, phase="sft")
    assert read_metrics(log.path) == [
        {"step": 1, "loss": 1.0, "phase": "sft", "nll": 0.7},
        {"step": 1, "reward": 0.5, "phase": "rl"},
    ]


BROKEN_LINES = {
    "cut": '{"step": 1, "loss"',
    "list": "[1]",
    "no step": '{"loss": 1}',
    "number": "17",
    "step of a kind": '{"step": [1]}',
    "phase of a kind": '{"step": 1, "phase": {}}',
    "deep": '{"step": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_a_broken_line_before_the_last_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0}) + f'\n{line}\n{{"step": 2}}\n')
    with pytest.raises(CourseError, match=r"metrics\.jsonl:2: not a JSON object with a step"):
        read_metrics(path)


def test_a_missing_log_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


# --------------------------------------------------------------------------------------------------
# KL estimators against exact values

TARGET = [0.7, 0.2, 0.1]
REFERENCE = [0.2, 0.3, 0.5]
# sum p log(p / q) = 0.7 log 3.5 + 0.2 log(2/3) + 0.1 log 0.2
KL_TARGET_REFERENCE = 0.7 * 1.2527630 + 0.2 * -0.4054651 + 0.1 * -1.6094379


def expectation(estimator, sampled_from: list[float], p: list[float], q: list[float]) -> float:
    """The exact mean of an estimator over the outcomes of `sampled_from`."""
    estimates = estimator([math.log(x) for x in p], [math.log(x) for x in q])
    return sum(weight * value for weight, value in zip(sampled_from, estimates, strict=True))


def test_the_exact_kl_is_the_known_one() -> None:
    assert abs(KL_TARGET_REFERENCE - 0.635) < 5e-4


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased_with_their_sign(estimator) -> None:
    mean = expectation(estimator, TARGET, TARGET, REFERENCE)
    assert mean == pytest.approx(KL_TARGET_REFERENCE, abs=1e-6)


def test_with_the_ratio_turned_round_k1_is_minus_kl_and_k3_is_wrong() -> None:
    """A published course has this bug: its test looked only at ratios near 1, where both agree."""
    assert expectation(kl_k1, TARGET, REFERENCE, TARGET) == pytest.approx(-0.635, abs=5e-4)
    assert expectation(kl_k3, TARGET, REFERENCE, TARGET) == pytest.approx(0.968, abs=5e-4)


def test_k2_is_half_the_squared_log_ratio() -> None:
    """By hand: (0.7 * 1.2528^2 + 0.2 * 0.4055^2 + 0.1 * 1.6094^2) / 2 = 0.6953, not the KL."""
    mean = expectation(kl_k2, TARGET, TARGET, REFERENCE)
    assert mean == pytest.approx(0.69525, abs=1e-5)


def test_k2_and_k3_are_never_negative_where_k1_is() -> None:
    target, reference = [math.log(0.2)], [math.log(0.3)]
    assert kl_k1(target, reference)[0] < 0
    assert kl_k2(target, reference)[0] > 0 and kl_k3(target, reference)[0] > 0


def test_k3_keeps_its_digits_where_the_two_models_almost_agree() -> None:
    """(r - 1) - log r computed plainly is -1e-17 or 0 here; the true value is delta^2 / 2."""
    assert kl_k3([-1.0], [-1.0 + 1e-6])[0] == pytest.approx(5e-13, rel=1e-3)


logprob = st.floats(-20, 0)


@settings(deadline=None)
@given(st.lists(st.tuples(logprob, logprob), min_size=1))
def test_the_estimators_are_per_token_and_zero_only_without_a_difference(pairs) -> None:
    target, reference = map(list, zip(*pairs, strict=True))
    for estimator in (kl_k1, kl_k2, kl_k3):
        values = estimator(target, reference)
        assert len(values) == len(pairs)
        assert estimator(target, target) == [0.0] * len(pairs)
    assert all(value >= 0 for value in kl_k2(target, reference))
    assert all(value >= -1e-12 for value in kl_k3(target, reference))


def test_logprobs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        kl_k1([-1.0, -2.0], [-1.0])


# --------------------------------------------------------------------------------------------------
# pass@k and intervals


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 2), (4, 4, 2), (4, 0, 4)])
def test_pass_at_k_counts_the_draws_with_a_right_sample(n: int, c: int, k: int) -> None:
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_is_not_the_biased_formula() -> None:
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # 1 - (1 - 2/4)^2 would be 3/4


def test_pass_at_k_is_certain_when_too_few_are_wrong() -> None:
    assert pass_at_k(10, 8, 3) == 1.0
    assert pass_at_k(1000, 0, 500) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(CourseError, match="do not fit together"):
        pass_at_k(n, c, k)


def test_the_bootstrap_interval_agrees_with_the_normal_one_on_many_values() -> None:
    """400 values, 300 of them 1: the mean is 0.75, its error sqrt(.75 * .25 / 400) = 0.0217."""
    low, high = bootstrap_interval([1.0] * 300 + [0.0] * 100)
    assert low == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.006)
    assert high == pytest.approx(0.75 + 1.96 * 0.02165, abs=0.006)


def test_ninety_five_percent_of_the_intervals_hold_the_true_mean() -> None:
    """200 draws; with a true coverage of 0.94 fewer than 178 hits have a chance below 0.3 %."""
    rng = random.Random(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval([rng.gauss(2.0, 1.0) for _ in range(60)], seed=seed)
        hits += low <= 2.0 <= high
    assert 178 <= hits <= 199


def test_a_higher_level_gives_a_wider_interval_and_a_seed_repeats() -> None:
    values = [float(x) for x in range(20)]
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide[0] < narrow[0] < 9.5 < narrow[1] < wide[1]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([1.0], 0.0), ([1.0], 1.0)])
def test_an_interval_of_nothing_is_refused(values: list[float], level: float) -> None:
    with pytest.raises(CourseError, match="bootstrap_interval"):
        bootstrap_interval(values, level)
