"""The lessons' explorers: each joins data, controls and a figure function; `.show()` shows it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from course_lib.conversations import Conversation
from course_lib.plots.bars import stacked_figure
from course_lib.plots.estimators import estimators_figure, exact_kl, sample_estimates
from course_lib.plots.groups import dead_groups_figure, luck_figure
from course_lib.plots.lora import Run, lora_run_figure
from course_lib.plots.ratios import Curve, losses_figure
from course_lib.plots.tokens import token_strip
from course_lib.rendering import render_conversation
from course_lib.widgets.explore import Explorer, choice, dropdown, slider

MASKS = ("last_assistant", "all_assistant", "everything", "header too", "end missing")


def mask_viewer(conversations: Sequence[Conversation], tokenizer: Any) -> Explorer:
    """Which tokens of a conversation are trained on, under right and wrong masks."""

    def draw(conversation: int, mask: str):
        tokens, weights = masked(conversations[conversation - 1], tokenizer, mask)
        return token_strip(tokens, weights, f"Trained on: {mask}")

    controls = {
        "conversation": slider("conversation", 1, len(conversations), 1, 1),
        "mask": dropdown("mask", MASKS, MASKS[0]),
    }
    return Explorer(draw, controls)


def masked(conversation: Conversation, tokenizer: Any, mask: str) -> tuple[list[str], list[float]]:
    """Tokens as text and their weights; the last three of `MASKS` are mistakes, made on purpose."""
    right = "all_assistant" if mask == "all_assistant" else "last_assistant"
    rendered = render_conversation(conversation, tokenizer, right)
    tokens, weights = [tokenizer.decode([t]) for t in rendered.tokens], list(rendered.weights)
    if mask == "everything":
        weights = [1.0] * len(weights)
    elif mask == "header too":
        weights = [max(pair) for pair in zip(weights, [*weights[1:], 0.0], strict=True)]
    elif mask == "end missing":
        last = max((i for i, weight in enumerate(weights) if weight), default=0)
        weights[last] = 0.0
    return tokens, weights


def lora_explorer(runs: Mapping[Run, Sequence[float]], every: int = 1) -> Explorer:
    """Walk through a sweep: (rank, alpha, learning rate) -> held-out loss each `every` steps."""
    ranks, alphas, rates = (sorted({run[i] for run in runs}) for i in range(3))

    def draw(rank: int, alpha: float, rate: float):
        return lora_run_figure(runs, (rank, alpha, rate), every)

    controls = {
        "rank": choice("rank", ranks, ranks[len(ranks) // 2]),
        "alpha": choice("alpha", alphas, alphas[len(alphas) // 2]),
        "rate": choice("learning rate", [(f"{r:g}", r) for r in rates], rates[len(rates) // 2]),
    }
    return Explorer(draw, controls)


def reward_designer(
    completions: Sequence[str], parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]
) -> Explorer:
    """Weigh the parts of a reward and see what each completion of a gallery would earn."""

    def draw(**chosen: float):
        weighted = {name: [chosen[name] * value for value in parts[name]] for name in parts}
        return stacked_figure(completions, weighted, "What each completion earns", "reward")

    controls = {name: slider(name, -1.0, 2.0, float(weights.get(name, 0)), 0.1) for name in parts}
    return Explorer(draw, controls)


def group_explorer(p: float = 0.05, group_size: int = 8) -> Explorer:
    """How many groups are dead, and how much signal the others hold."""
    controls = {
        "p": slider("chance of a right answer", 0.0, 1.0, p),
        "group_size": slider("group size", 2, 32, group_size, 1),
    }
    return Explorer(dead_groups_figure, controls)


def clip_explorer() -> Explorer:
    """Ratio, advantage and clip: what three losses and their gradients make of one token."""
    ratios = [0.2 + 0.02 * i for i in range(141)]

    def draw(ratio: float, advantage: float, low: float, high: float):
        curves = loss_curves(ratios, advantage, low, high)
        return losses_figure(ratios, curves, advantage, ratio, (low, high))

    controls = {
        "ratio": slider("ratio", 0.2, 3.0, 1.5, 0.05),
        "advantage": slider("advantage", -2.0, 2.0, 1.0, 0.25),
        "low": slider("clip_low_threshold", 0.0, 1.0, 0.8, 0.05),
        "high": slider("clip_high_threshold", 1.0, 3.0, 1.2, 0.05),
    }
    return Explorer(draw, controls)


def loss_curves(
    ratios: Sequence[float], advantage: float, low: float, high: float
) -> dict[str, Curve]:
    """Loss and gradient of one token by its ratio: the engine's own losses, through autograd.

    CISPO's weight is a constant to autograd, so its gradient is not its loss's slope.
    """
    import torch

    from course_lib.losses import LOSSES

    clip = {"clip_low_threshold": low, "clip_high_threshold": high}
    sampled = torch.full((len(ratios),), -1.0)
    inputs = {"logprobs": sampled, "advantages": torch.full((len(ratios),), float(advantage))}
    curves = {}
    for name in ("importance_sampling", "ppo", "cispo"):
        target = (sampled + torch.tensor(ratios).log()).requires_grad_()
        losses = LOSSES[name](target, inputs, {} if name == "importance_sampling" else clip)
        (gradients,) = torch.autograd.grad(losses.sum(), target)
        curves[name] = (None if name == "cispo" else losses.tolist(), gradients.tolist())
    return curves


def kl_sampler(
    policy: Sequence[float] = (0.7, 0.2, 0.1), reference: Sequence[float] = (0.2, 0.3, 0.5)
) -> Explorer:
    """Three estimators of one KL: how they spread with the number of sampled tokens."""

    def draw(tokens: int, distance: float, seed: int):
        moved = [distance * r + (1 - distance) * p for p, r in zip(policy, reference, strict=True)]
        estimates = sample_estimates(policy, moved, tokens, 300, seed)
        return estimators_figure(estimates, exact_kl(policy, moved))

    controls = {
        "tokens": choice("tokens per estimate", [1, 5, 20, 100], 20),
        "distance": slider("distance of the reference", 0.05, 1.0, 1.0, 0.05),
        "seed": slider("seed", 0, 20, 0, 1),
    }
    return Explorer(draw, controls)


def luck_explorer(before: Sequence[float], after: Sequence[float]) -> Explorer:
    """Could this gain be luck? Take fewer problems, or others, and look at the interval."""
    gains = [b - a for a, b in zip(before, after, strict=True)]

    def draw(problems: int, seed: int):
        chosen = random.Random(seed).sample(gains, problems)
        return luck_figure(chosen, resampled_means(chosen, 1000, seed))

    most = len(gains)
    controls = {
        "problems": slider("problems", min(10, most), most, most, 1),
        "seed": slider("other problems (seed)", 0, 20, 0, 1),
    }
    return Explorer(draw, controls)


def resampled_means(values: Sequence[float], count: int, seed: int) -> list[float]:
    """Means of `count` draws with replacement, as large as the list itself."""
    rng = random.Random(seed)
    return [sum(rng.choices(values, k=len(values))) / len(values) for _ in range(count)]
