"""What is measured: every row of the table, its contenders, its target and the work in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flops import sample_flops, train_flops

OURS = "ours"
SHORT = (25.0, 10.0)  # mean tokens of a short row, and how many of them are trained
ANSWER = 14.0  # mean tokens that the shipped model answers with
QUESTION = 17.0  # mean tokens of a short prompt


@dataclass(frozen=True)
class Target:
    """At least `ratio` times as fast as `peer`; `memory`: with no more memory than it."""

    peer: str
    ratio: float
    share: float | None = None  # of the matrix peak
    memory: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table. `sides`: contender name -> (function, options that are its own)."""

    name: str
    title: str
    model: str
    sides: dict[str, tuple[str, dict[str, Any]]]
    options: dict[str, Any]
    targets: tuple[Target, ...]
    flops: Callable[[], float] | None = None
    laps: int = 1
    warm_ups: int = 1
    laps_of: dict[str, int] = field(default_factory=dict)


def sft_row(name: str, model: str, title: str, target: Target, **options: Any) -> Row:
    batch, shape, vocabulary = (options[key] for key in ("batch", "shape", "vocabulary"))
    length, trained = SHORT if shape == "short" else (float(shape), float(shape) - 1)
    return Row(
        name,
        title,
        model,
        {OURS: ("ours:sft", {}), "TRL": ("peers:sft", {"parts": options.get("parts", 1)})},
        {"model": model, "shape": shape, "batch": batch, "vocabulary": vocabulary},
        (target,),
        lambda: train_flops(model, batch * length, batch * trained, length),
        laps=options.get("laps", 1),
        warm_ups=options.get("warm_ups", 1),
    )


def grpo_row(name: str, model: str, title: str, target: Target, **options: Any) -> Row:
    prompts, group, tokens = (options[key] for key in ("prompts", "group", "tokens"))
    prompt = options.get("length") or QUESTION

    def flops() -> float:
        new, read = prompts * group * tokens, prompts * prompt
        trained = train_flops(model, read + new, new, prompt + tokens / 2)
        return trained + sample_flops(model, read, new, prompt + tokens / 2)

    return Row(
        name,
        title,
        model,
        {OURS: ("ours:grpo", {}), "TRL": ("peers:grpo", {"parts": options.get("parts", 1)})},
        {
            "model": model,
            **{k: v for k, v in options.items() if k not in ("laps", "warm_ups", "parts")},
        },
        (target,),
        flops,
        laps=options.get("laps", 1),
        warm_ups=options.get("warm_ups", 1),
    )


def sample_row(name: str, model: str, title: str, mean: float | None = None) -> Row:
    """`mean`: completions end after so many tokens on average; None: at the limit."""
    calls, tokens = 64, 64  # as many tokens as a completion of the course may have
    new = mean or tokens
    one, batch = "generate, one by one", "generate, one padded batch"
    return Row(
        name,
        title,
        model,
        {
            OURS: ("ours:sample", {}),
            one: ("peers:generate", {"at_once": False}),
            batch: ("peers:generate", {"at_once": True}),
        },
        {"model": model, "calls": calls, "tokens": tokens, "stops": mean is not None},
        (Target(one, 6.0), Target(batch, 1.5)),
        lambda: sample_flops(model, calls * QUESTION, calls * new, QUESTION + new / 2),
        laps_of={OURS: 3, batch: 3},
    )


SMALL_SFT = {"batch": 32, "shape": "short", "vocabulary": 1024, "laps": 7, "warm_ups": 5}
SMALL_GRPO = {"prompts": 16, "group": 8, "tokens": 8, "laps": 3, "warm_ups": 3}
SFT_TITLE = "SFT step, 32 short rows"
GRPO_TITLE = "GRPO step, 16 prompts x 8 samples x 8 tokens"
STOPPING_TITLE = "64 `sample` calls at once, until each answer ends (64 tokens at most)"
SAMPLE_TITLE = "64 `sample` calls at once, 64 tokens each"
DUELS = {
    row.name: row
    for row in (
        sft_row("sft", "0.9M", SFT_TITLE, Target("TRL", 1.8), **SMALL_SFT),
        grpo_row("grpo", "0.9M", GRPO_TITLE, Target("TRL", 3.0), **SMALL_GRPO),
        sample_row("sample", "0.9M", SAMPLE_TITLE),
        sft_row(
            "big_sft",
            "135M",
            "SFT step, 8 rows x 512 tokens",
            Target("TRL", 1.15, share=0.5, memory=True),
            batch=8,
            shape="512",
            vocabulary=49_152,
            warm_ups=0,
            parts=2,
        ),
        grpo_row(
            "big_grpo",
            "135M",
            "GRPO step, 4 prompts x 8 samples x 64 tokens, prompts of 256",
            Target("TRL", 2.0),
            prompts=4,
            group=8,
            tokens=64,
            length=256,
            warm_ups=0,
            parts=4,
        ),
        sft_row("sft_shipped", "shipped", SFT_TITLE, Target("TRL", 1.8), **SMALL_SFT),
        grpo_row("grpo_shipped", "shipped", GRPO_TITLE, Target("TRL", 3.0), **SMALL_GRPO),
        sample_row("sample_shipped", "shipped", STOPPING_TITLE, mean=ANSWER),
    )
}
