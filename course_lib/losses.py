"""What is minimised: the losses of `forward_backward`, by the names the `tinker` SDK gives them.

Each takes the log-probabilities of the target tokens under the model in training, the datum's other
inputs and the call's `loss_fn_config`, and returns one loss per token. Nothing is averaged: the
engine sums over tokens and datums, so who wants a mean divides the weights or advantages first.

Shapes: every tensor is (N,) for one datum or (B, N) for several, and so is the result;
`cross_entropy` also takes (N, K), K target tokens for each position. In the equations

    lp = target_logprobs      q = inputs["logprobs"], the sampler's      A = inputs["advantages"]
    r  = exp(lp - q), the importance ratio     sg[.] = a value that no gradient flows through

Thresholds are ratios (0.8 to 1.2), not distances from one. Left out: `stable_reinforce`, whose
formula is not published.

Sources: https://tinker-docs.thinkingmachines.ai/losses, and the paper named in each function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from course_lib.errors import CourseError

LossFn = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]


def settings(config: Mapping[str, float], **defaults: float) -> list[float]:
    """The values of `config` in the order of `defaults`, which stand in for what is not given.

    >>> settings({"clip_high_threshold": 1.3}, clip_low_threshold=0.8, clip_high_threshold=1.2)
    [0.8, 1.3]
    """
    known = ", ".join(defaults) or "no settings"
    for key, value in config.items():
        if key not in defaults:
            raise CourseError("loss_fn_config", f"{key!r} is unknown", f"this loss takes {known}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise CourseError("loss_fn_config", f"{key} is {value!r}", "give a number")
    return [float(config.get(key, default)) for key, default in defaults.items()]


def clip_range(config: Mapping[str, float], low: float, high: float) -> tuple[float, float]:
    """The two clip thresholds of `config`, with these defaults; refused where they are crossed."""
    low, high = settings(config, clip_low_threshold=low, clip_high_threshold=high)
    if low > high:
        problem = f"clip_low_threshold, {low:g}, lies above clip_high_threshold, {high:g}"
        raise CourseError("loss_fn_config", problem, "clip to a range such as 0.8 to 1.2")
    return low, high


def importance_ratio(log_ratio: Tensor, matters: Tensor) -> Tensor:
    """r = exp(log r), at most e^80 where more does not matter: the advantage is 0, or the clip cuts
    it off. Infinity times 0 would be no number, in the loss or in its gradient.
    """
    return torch.exp(torch.where(matters, log_ratio, log_ratio.clamp(max=80.0)))


def cross_entropy(
    target_logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Weighted negative log-likelihood: -w lp."""
    settings(config)
    return -inputs["weights"] * target_logprobs


def importance_sampling(
    target_logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Policy gradient for tokens drawn from another policy: -r A (Kakade and Langford 2002)."""
    settings(config)
    advantages = inputs["advantages"]
    ratio = importance_ratio(target_logprobs - inputs["logprobs"], advantages != 0)
    return -ratio * advantages


def ppo(
    target_logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Clipped policy gradient: -min(r A, clip(r, low, high) A) (Schulman et al. 2017, eq. 7)."""
    low, high = clip_range(config, low=0.8, high=1.2)
    advantages = inputs["advantages"]
    ratio = importance_ratio(target_logprobs - inputs["logprobs"], advantages < 0)
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def cispo(
    target_logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """REINFORCE with a clipped weight: -sg[clip(r, low, high)] A lp (MiniMax-M1 2025, equation 4).

    Only the weight is clipped, so every token keeps a gradient; ppo drops the clipped ones.
    """
    low, high = clip_range(config, low=0.0, high=4.0)
    advantages = inputs["advantages"]
    ratio = importance_ratio(target_logprobs.detach() - inputs["logprobs"], advantages != 0)
    return -ratio.clamp(low, high) * advantages * target_logprobs


def dro(
    target_logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Policy gradient held near the sampler: -(A lp - beta/2 (lp - q)^2) (Richemond et al. 2024).

    The square acts where A is 0, too: give prompt positions a q that is the model's own.
    """
    (beta,) = settings(config, beta=0.05)
    log_ratio = target_logprobs - inputs["logprobs"]
    return -(inputs["advantages"] * target_logprobs - beta / 2 * log_ratio**2)


def gspo(
    target_logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """ppo with one ratio per sequence, s = exp(mean(lp - q)) (Zheng et al. 2025, eq. 7 and 14).

    The mean is over `sequence_ratio_mask`. Every token has the value of s and a gradient of its
    own: s exp(lp - sg[lp]). The default range is ppo's; the paper's is 1 - 3e-4 to 1 + 4e-4.
    """
    low, high = clip_range(config, low=0.8, high=1.2)
    mask, advantages = inputs["sequence_ratio_mask"], inputs["advantages"]
    log_ratio = ((target_logprobs - inputs["logprobs"]).detach() * mask).sum(-1, keepdim=True)
    sequence_log_ratio = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = sequence_log_ratio + target_logprobs - target_logprobs.detach()  # (N,)
    ratio = importance_ratio(log_ratio, advantages < 0)
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


LOSSES: dict[str, LossFn] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}

# What `loss_fn_inputs` must hold, besides the `target_tokens` that every loss needs.
LOSS_INPUTS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("weights",),
    "importance_sampling": ("logprobs", "advantages"),
    "ppo": ("logprobs", "advantages"),
    "cispo": ("logprobs", "advantages"),
    "dro": ("logprobs", "advantages"),
    "gspo": ("logprobs", "advantages", "sequence_ratio_mask"),
}


def check_settings(loss_fn: str, config: Mapping[str, float]) -> None:
    """Raises CourseError for a setting that the loss does not take."""
    one = torch.ones(1)  # a loss reads its settings when it is computed
    LOSSES[loss_fn](one, dict.fromkeys(LOSS_INPUTS[loss_fn], one), config)
