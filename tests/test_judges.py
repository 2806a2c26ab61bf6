"""Judges and tournaments: duels by hand, in both orders, and what standing first is worth."""

import math

import pytest
from chat_templates import COURSE, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from toy_policy import ToyPolicy

from course_lib.conversations import Message
from course_lib.environments import Problem
from course_lib.judges import (
    Duel,
    judge_by_asking,
    judge_by_rule,
    judge_by_strength,
    position_bias,
    preference_reward,
    reward_model,
    tournament_reward,
    win_matrix,
    win_rate,
)
from course_lib.rewards import Score

PROBLEM = Problem((Message("user", "Who?"),))
TOKENIZER = byte_tokenizer(COURSE)


def longer(problem, text):
    return Score(float(len(text)), {}, "")


def partial_to_the_first(duels):
    """Prefers the longer one, and gives 0.2 to whoever stands first."""
    fair = judge_by_rule(longer)(duels)
    return [0.8 * each + 0.2 for each in fair]


def test_a_tournament_pays_the_share_of_duels_won():
    (scores,) = tournament_reward(judge_by_rule(longer)).score(
        [PROBLEM], [["a", "bb", "ccc", "dd"]]
    )
    assert [score.value for score in scores] == pytest.approx([0, 1.5 / 3, 1, 1.5 / 3])
    assert scores[2].reason == "won 3.0 of 3 duels"
    assert all(score.parts["position_bias"] == pytest.approx(0) for score in scores)


def test_position_bias_is_measured_and_does_not_reach_the_reward():
    texts = ["a", "bb", "ccc"]
    (fair,) = tournament_reward(judge_by_rule(longer)).score([PROBLEM], [texts])
    (biased,) = tournament_reward(partial_to_the_first).score([PROBLEM], [texts])
    # fair: 0.5 on average; 0.8 * 0.5 + 0.2 = 0.6 for standing first
    assert biased[0].parts["position_bias"] == pytest.approx(0.1)
    assert [s.value for s in biased] == pytest.approx([0.5 + 0.8 * (s.value - 0.5) for s in fair])
    assert position_bias(partial_to_the_first, [Duel(PROBLEM, "a", "bb")]) == pytest.approx(0.1)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=6))
def test_the_mean_of_a_tournament_is_one_half(texts):
    (scores,) = tournament_reward(partial_to_the_first).score([PROBLEM], [texts])
    assert sum(score.value for score in scores) / len(texts) == pytest.approx(0.5)


def test_win_matrix_and_win_rate_by_hand():
    assert win_matrix(judge_by_rule(longer), PROBLEM, ["a", "bb"]) == [[0.5, 0.0], [1.0, 0.5]]
    problems = [PROBLEM] * 3
    assert win_rate(judge_by_rule(longer), problems, ["aa", "b", "c"], ["a", "b", "cc"]) == 0.5
    assert win_rate(partial_to_the_first, problems, ["aa"] * 3, ["a"] * 3) == pytest.approx(0.9)


def test_rounding_wins_no_duel():
    rewards = {"a": 0.1 + 0.2, "b": 0.3}
    judge = judge_by_rule(lambda problem, text: Score(rewards[text], {}, ""))
    assert judge([Duel(PROBLEM, "a", "b"), Duel(PROBLEM, "b", "a")]) == [0.5, 0.5]


def test_strengths_become_bradley_terry_probabilities():
    def strengths(replies):
        return [math.log(0.6 if text == "good" else 0.2) for _, text in replies]

    judge = judge_by_strength(strengths)
    found = judge([Duel(PROBLEM, "good", "bad"), Duel(PROBLEM, "bad", "good")])
    assert found == pytest.approx([0.75, 0.25])
    (scores,) = preference_reward(strengths).score([PROBLEM], [["good", "bad", "bad"]])
    assert [score.value for score in scores] == pytest.approx([0.6, 0.2, 0.2])
    scores = preference_reward(strengths).score([PROBLEM, PROBLEM], [["good", "bad"], ["bad"]])
    assert [len(group) for group in scores] == [2, 1]
    assert scores[1][0].value == pytest.approx(0.2)  # no score slips into the next group


def test_judges_read_a_models_logprobs():
    sampler = ToyPolicy(len(TOKENIZER)).save_weights_and_get_sampling_client().result()
    strengths = reward_model(sampler, TOKENIZER)([(PROBLEM, "x"), (PROBLEM, "y"), (PROBLEM, "x")])
    assert all(value < 0 for value in strengths) and strengths[0] == strengths[2]
    (first,) = judge_by_asking(sampler, TOKENIZER)([Duel(PROBLEM, "x", "y")])
    header = TOKENIZER.convert_tokens_to_ids("<|assistant|>")
    a, b = (float(sampler.table[header, TOKENIZER.encode(each)[0]]) for each in "AB")
    assert first == pytest.approx(1 / (1 + math.exp(b - a)))  # P(A) against P(B), not B against A
