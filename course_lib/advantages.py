"""From rewards to advantages: how much better than its siblings was a completion?

Shao et al. 2024 (GRPO, https://arxiv.org/abs/2402.03300) divide by the group's standard deviation;
Liu et al. 2025 (Dr. GRPO, https://arxiv.org/abs/2503.20783) do not; Ahmadian et al. 2024 (RLOO,
https://arxiv.org/abs/2402.14740) compare with the mean of the others.
"""

from __future__ import annotations

import math

from course_lib.errors import CourseError


def group_advantages(rewards_G: list[float], kind: str = "centred") -> list[float]:
    """Reward minus a baseline that the group itself provides; the sum over a group is 0.

    >>> group_advantages([1.0, 0.0, 0.0, 1.0])
    [0.5, -0.5, -0.5, 0.5]
    >>> group_advantages([1.0, 0.0, 0.0, 1.0], "normalised")
    [1.0, -1.0, -1.0, 1.0]
    >>> group_advantages([1.0, 0.0, 0.0], "leave_one_out")
    [1.0, -0.5, -0.5]
    """
    if is_dead(rewards_G):
        return [0.0] * len(rewards_G)
    size = len(rewards_G)
    mean = sum(rewards_G) / size
    centred_G = [reward - mean for reward in rewards_G]
    if kind == "centred":
        return centred_G
    if kind == "normalised":
        std = math.sqrt(sum(each * each for each in centred_G) / size)
        return [each / std for each in centred_G]
    if kind == "leave_one_out":  # r_i - mean of the others = (r_i - mean) * G / (G - 1)
        return [each * size / (size - 1) for each in centred_G]
    remedy = "use centred, normalised or leave_one_out"
    raise CourseError("advantages", f"{kind!r} is unknown", remedy)


def is_dead(rewards_G: list[float]) -> bool:
    """Whether all rewards are equal: nothing to prefer, so nothing to learn from this group."""
    return max(rewards_G) - min(rewards_G) < 1e-9  # a judge model's rounding is no preference


def dead_group_probability(success: float, group_size: int) -> float:
    """The chance that a group of 0/1 rewards is dead: all right or all wrong.

    >>> round(dead_group_probability(0.05, 8), 3)
    0.663
    """
    return success**group_size + (1 - success) ** group_size
