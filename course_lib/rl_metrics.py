"""What one RL step can tell about itself: reward, spread, length, importance ratio, entropy. Pure
functions.

The importance ratio compares the trainer's logprob of a sampled token with the one it was sampled
with. Before the first update of a batch it must be 1: any deviation is a disagreement between
sampler and trainer.
"""

from __future__ import annotations

import math
from collections import defaultdict

from course_lib.environments import Environment, is_worked
from course_lib.rollouts import Group, Turn


def reward_metrics(groups: list[Group], environment: Environment) -> dict[str, float]:
    """Mean reward, its parts, its spread inside the groups, and what the completions look like."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    parts: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for name, value in (rollout.score.parts if rollout.score else {}).items():
            parts[f"reward/{name}"].append(value)
    metrics = {name: mean(values) for name, values in parts.items()}
    metrics["reward/total"] = mean([value for group in groups for value in group.rewards_G])
    metrics["reward/std_in_group"] = mean([_std(group.rewards_G) for group in groups])
    if environment.checkable:
        verdicts = [environment.grade(rollout.problem, rollout.text) for rollout in rollouts]
        metrics["env/correct"] = mean([float(verdict.value >= 1) for verdict in verdicts])
    metrics["env/worked_share"] = mean([float(is_worked(rollout.text)) for rollout in rollouts])
    lengths = [len(turn.completion_tokens) for rollout in rollouts for turn in rollout.turns]
    metrics["env/completion_tokens"] = mean([float(length) for length in lengths])
    metrics["env/stop_share"] = mean([float(each.stop_reason == "stop") for each in rollouts])
    metrics["env/turns"] = len(lengths) / len(rollouts)
    sampled = [each for rollout in rollouts for turn in rollout.turns for each in turn.logprobs]
    metrics["optim/entropy"] = -mean(sampled)  # in nats per token: E[-log p] is the entropy
    return metrics


def ratio_metrics(
    turns_D: list[Turn],
    advantages_D: list[float],
    target_logprobs_D_T: list[list[float]],
    clip: tuple[float, float],
) -> dict[str, float]:
    """How far the policy has moved from its samples, token by token.

    `ess` is the effective sample size as a share of the tokens; `clipped_up` are tokens with a
    positive advantage above the clip range, `clipped_down` those with a negative one below it: PPO
    gives both no gradient.
    """
    ratios, log_ratios, up, down = [], [], 0, 0
    for turn, advantage, target_T in zip(turns_D, advantages_D, target_logprobs_D_T, strict=True):
        tail_T = target_T[-len(turn.logprobs) :]  # the prompt's tokens come first
        for target, sampling in zip(tail_T, turn.logprobs, strict=True):
            log_ratios.append(target - sampling)
            ratios.append(math.exp(min(target - sampling, 80.0)))
            up += advantage > 0 and ratios[-1] > clip[1]
            down += advantage < 0 and ratios[-1] < clip[0]
    count = len(ratios)
    return {
        "kl/sample_train_k1": -mean(log_ratios),
        "kl/sample_train_k3": mean([r - 1 - lr for r, lr in zip(ratios, log_ratios, strict=True)]),
        "ratio/max_deviation": max(abs(ratio - 1) for ratio in ratios),
        "ratio/mean": mean(ratios),
        "ratio/ess": sum(ratios) ** 2 / (count * sum(ratio * ratio for ratio in ratios)),
        "ratio/clipped_up": up / count,
        "ratio/clipped_down": down / count,
    }


def mean(values: list[float]) -> float:
    """The arithmetic mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def _std(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(mean([(value - centre) ** 2 for value in values]))
