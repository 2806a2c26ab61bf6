"""Advantages: hand-computed values, and what holds for every group."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.advantages import dead_group_probability, group_advantages, is_dead
from course_lib.errors import CourseError

KINDS = ("centred", "normalised", "leave_one_out")
groups = st.lists(st.floats(-100, 100), min_size=2, max_size=16)


def test_the_better_completion_gets_the_positive_advantage():
    # mean 0.25; std sqrt(3)/4; the others of the first have mean 0, those of the rest 1/3
    rewards_G = [1.0, 0.0, 0.0, 0.0]
    assert group_advantages(rewards_G) == [0.75, -0.25, -0.25, -0.25]
    normalised = group_advantages(rewards_G, "normalised")
    assert normalised == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])
    left_out = group_advantages(rewards_G, "leave_one_out")
    assert left_out == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


@given(groups, st.sampled_from(KINDS))
def test_advantages_sum_to_zero_in_every_group(rewards_G, kind):
    assert sum(group_advantages(rewards_G, kind)) == pytest.approx(0, abs=1e-6)


@given(groups, st.sampled_from(KINDS), st.floats(-100, 100))
def test_a_constant_added_to_every_reward_changes_nothing(rewards_G, kind, constant):
    spread = max(rewards_G) - min(rewards_G)
    if spread < 1e-3:
        return  # normalising divides rounding by rounding
    shifted = group_advantages([reward + constant for reward in rewards_G], kind)
    assert shifted == pytest.approx(group_advantages(rewards_G, kind), abs=1e-6)


@given(groups)
def test_normalised_advantages_ignore_the_scale_of_the_reward(rewards_G):
    if max(rewards_G) - min(rewards_G) < 1e-3:
        return
    tenfold = group_advantages([10 * reward for reward in rewards_G], "normalised")
    assert tenfold == pytest.approx(group_advantages(rewards_G, "normalised"), abs=1e-6)


@given(groups)
def test_the_order_of_advantages_is_the_order_of_rewards(rewards_G):
    advantages_G = group_advantages(rewards_G)
    best = rewards_G.index(max(rewards_G))
    assert advantages_G[best] == max(advantages_G) >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_dead_group_has_no_advantage(kind, reward):
    # 0.1 * 8 summed and divided is not 0.1 in binary: dead must not depend on that
    assert is_dead([reward] * 8)
    assert group_advantages([reward] * 8, kind) == [0.0] * 8


def test_a_small_difference_is_a_preference_and_a_rounding_is_none():
    assert not is_dead([0.5, 0.501])
    assert is_dead([0.1 + 0.2, 0.3])


def test_small_groups_are_mostly_dead_on_hard_problems():
    chances = [round(dead_group_probability(0.05, size), 3) for size in (2, 4, 8, 16)]
    assert chances == [0.905, 0.815, 0.663, 0.44]


def test_an_unknown_kind_is_told():
    with pytest.raises(CourseError, match="centred, normalised or leave_one_out"):
        group_advantages([0.0, 1.0], "centered")
