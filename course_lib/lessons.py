"""What several lessons need: a quick SFT to stand on, next-token probabilities, words for results.

Two kinds of printed lines differ from machine to machine, because sampling and rounding do: what a
model wrote (`quote`) and what was measured (`measured`). They begin with "> " and "measured: ", and
the notebooks' tests compare everything else. A claim that must hold everywhere is a `band`.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from course_lib.config import find_file, preset
from course_lib.conversations import Conversation, load_conversations
from course_lib.sft import SFTResult, train_sft

if TYPE_CHECKING:
    import tinker

    from course_lib.client import CourseService

SFT_STEPS = 80  # enough for the format, far from enough for the sums: room for RL


def shipped_conversations(
    name: str = "conversations", limit: int | None = None
) -> list[Conversation]:
    """The project's own data, from any working folder: conversations or heldout."""
    return load_conversations(str(find_file(f"data/{name}.jsonl")), limit=limit)


def quick_sft(
    service: CourseService, steps: int = SFT_STEPS, *, seed: int = 0
) -> tuple[tinker.TrainingClient, Any, SFTResult]:
    """A few seconds of SFT on the shipped conversations: (training client, tokenizer, result).

    What lesson 03 explains, at 16 conversations a step; later lessons start from here.
    """
    rank = preset().sft.lora_rank
    client = service.create_lora_training_client(service.base_model, rank=rank, seed=seed).result()
    tokenizer = client.get_tokenizer()
    config = replace(preset().sft, batch_size=16, max_steps=steps, save_every=0, eval_every=0)
    result = train_sft(client, shipped_conversations(), config, tokenizer=tokenizer, seed=seed)
    print(f"SFT: {steps} steps of 16 conversations.")
    return client, tokenizer, result


def next_tokens(
    sampling_client: tinker.SamplingClient, prompt_tokens: list[int], among: list[int]
) -> list[float]:
    """The log-probability of each token in `among` as the next one after the prompt."""
    import tinker

    futures = [
        sampling_client.compute_logprobs(tinker.ModelInput.from_ints([*prompt_tokens, token]))
        for token in among
    ]
    return [float(future.result()[-1]) for future in futures]  # type: ignore[arg-type]


def quote(text: str, who: str = "") -> None:
    """Print what a model wrote, each line behind "> "."""
    body = text if text.strip() else "(nothing)"
    for line in textwrap.wrap(f"{who}: {body}" if who else body, width=96) or ["(nothing)"]:
        print(f"> {line}")


def measured(what: str, value: float, unit: str = "") -> None:
    """Print a number that may differ a little from machine to machine."""
    shown = f"{value:.1%}" if unit == "%" else f"{value:.4g} {unit}".rstrip()
    print(f"measured: {what} {shown}")


def band(claim: str, holds: bool) -> None:
    """Print a claim and whether it holds: what must be the same on every machine."""
    print(f"{claim}: {'yes' if holds else 'no'}")
