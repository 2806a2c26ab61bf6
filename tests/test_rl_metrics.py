"""The numbers of a step, against hand computations."""

import math
from dataclasses import replace

import pytest

from course_lib.conversations import Message
from course_lib.environments import Environment, Problem
from course_lib.rewards import Score
from course_lib.rl_metrics import ratio_metrics, reward_metrics
from course_lib.rollouts import Group, Rollout, Turn

PROBLEM = Problem((Message("user", "?"),), "1")


def test_ratio_metrics_of_two_tokens_by_hand():
    turn = Turn([1, 2, 3], [4, 5], [math.log(0.5), math.log(0.5)])
    target_T = [-9.0, -9.0, math.log(0.75), math.log(0.25)]  # the prompt's two targets come first
    found = ratio_metrics([turn], [1.0], [target_T], (0.8, 1.2))
    # ratios 1.5 and 0.5
    assert found["ratio/max_deviation"] == pytest.approx(0.5)
    assert found["ratio/mean"] == pytest.approx(1.0)
    assert found["ratio/ess"] == pytest.approx(4 / (2 * 2.5))
    assert found["ratio/clipped_up"] == 0.5  # 1.5 > 1.2 with a positive advantage
    assert found["ratio/clipped_down"] == 0.0  # 0.5 < 0.8, but the advantage is positive
    k1 = -(math.log(1.5) + math.log(0.5)) / 2
    assert found["kl/sample_train_k1"] == pytest.approx(k1)
    assert found["kl/sample_train_k3"] == pytest.approx(k1)  # the mean ratio is 1 here


def test_a_negative_advantage_is_clipped_below():
    turn = Turn([1], [4, 5], [0.0, 0.0])
    found = ratio_metrics([turn], [-1.0], [[math.log(0.5), math.log(2)]], (0.8, 1.2))
    assert (found["ratio/clipped_up"], found["ratio/clipped_down"]) == (0.0, 0.5)


def test_a_ratio_below_one_deviates_as_much_as_one_above():
    turn = Turn([1], [4, 5], [0.0, 0.0])
    found = ratio_metrics([turn], [1.0], [[math.log(0.5), math.log(1.1)]], (0.8, 1.2))
    assert found["ratio/max_deviation"] == pytest.approx(0.5)


def rollout(text, logprobs, value, reason="stop"):
    score = Score(value, {"part": value / 2}, "")
    return Rollout(PROBLEM, [1], list(range(len(logprobs))), logprobs, text, score, reason)


def test_reward_metrics_by_hand():
    group = Group(
        PROBLEM,
        [rollout("1 + 0 = 1", [-1.0, -3.0], 1.0), rollout("2", [-2.0, -2.0], 0.0, "length")],
    )
    toy = Environment(
        "toy", lambda n, s: [], lambda n, s: [], lambda p, c: Score(float(c == "2"), {}, "")
    )
    found = reward_metrics([group], toy)
    assert found["reward/total"] == 0.5 and found["reward/part"] == 0.25
    assert found["reward/std_in_group"] == 0.5
    assert found["env/correct"] == 0.5  # the environment's verdict, not the reward
    assert found["env/worked_share"] == 0.5
    assert found["env/completion_tokens"] == 2 and found["env/stop_share"] == 0.5
    assert found["optim/entropy"] == 2.0


def test_half_a_verdict_is_not_right_and_what_was_cut_did_not_stop():
    ends = ("stop", "length", "length", "length")
    group = Group(PROBLEM, [rollout("2", [-1.0], 0.0, reason) for reason in ends])
    half = Environment("toy", lambda n, s: [], lambda n, s: [], lambda p, c: Score(0.5, {}, ""))
    found = reward_metrics([group], half)
    assert found["env/correct"] == 0.0
    assert found["env/stop_share"] == 0.25


def test_turns_are_counted_and_all_of_them_have_lengths():
    again = replace(rollout("2", [-1.0], 0.0), earlier_turns=(Turn([1], [2, 3, 4], [-1.0] * 3),))
    toy = Environment("toy", lambda n, s: [], lambda n, s: [], checkable=False)
    found = reward_metrics([Group(PROBLEM, [rollout("2", [-1.0], 0.0), again])], toy)
    assert found["env/turns"] == 1.5 and found["env/completion_tokens"] == pytest.approx(5 / 3)
