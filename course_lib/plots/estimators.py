"""KL estimators: many estimates from samples, beside the exact value on a small distribution."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.metrics import kl_k1, kl_k2, kl_k3
from course_lib.plots.style import CYCLE, INK, course_style, label, new_figure
from course_lib.plots.words import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def exact_kl(policy: Sequence[float], reference: Sequence[float]) -> float:
    """KL(policy || reference) of two distributions, in nats.

    >>> round(exact_kl([0.7, 0.2, 0.1], [0.2, 0.3, 0.5]), 3)
    0.635
    """
    return sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True) if p)


def sample_estimates(
    policy: Sequence[float], reference: Sequence[float], tokens: int, repeats: int, seed: int
) -> dict[str, list[float]]:
    """For k1, k2 and k3 `repeats` estimates, each the mean over `tokens` draws from the policy."""
    rng = random.Random(seed)
    estimates: dict[str, list[float]] = {"k1": [], "k2": [], "k3": []}
    for _ in range(repeats):
        drawn = rng.choices(range(len(policy)), policy, k=tokens)
        logprobs = [[math.log(p[i]) for i in drawn] for p in (policy, reference)]
        for name, estimate in (("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)):
            estimates[name].append(sum(estimate(*logprobs)) / tokens)
    return estimates


def estimators_figure(estimates: Mapping[str, Sequence[float]], exact: float) -> Figure:
    """For each estimator the spread of its estimates; the dashed line is the exact KL."""
    names = list(estimates)
    with course_style():
        figure, axes = new_figure(size=(7.2, 0.75 * len(names) + 1.2))
        values = [list(estimates[name]) for name in names]
        parts = axes.violinplot(values, orientation="horizontal", showmeans=True, widths=0.8)
        for number, body in enumerate(parts["bodies"]):  # type: ignore[arg-type]
            body.set(
                facecolor=CYCLE[number],
                edgecolor=INK,
                alpha=0.6,
                hatch=["", "//", ".."][number % 3],
            )
        for part in ("cmeans", "cbars", "cmins", "cmaxes"):
            parts[part].set(color=INK, linewidth=1)
        axes.axvline(exact, color=INK, linestyle="--", linewidth=1.4, label=f"exact: {exact:.3f}")
        axes.set_yticks(range(1, len(names) + 1), names)
        axes.invert_yaxis()
        label(axes, "Estimates of one KL", "estimate (nats)", "")
        axes.legend(loc="best")
    means = ", ".join(
        f"{name} {sum(v) / len(v):.2f}" for name, v in zip(names, values, strict=True)
    )
    return describe(figure, f"Estimates of a KL of {exact:.3f} nats. Means: {means}.")
