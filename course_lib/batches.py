"""What does a training request hold? Token t is read, token t + 1 is predicted.

    tokens   <|user|>  2      +      3       <|end|>  <|assistant|>  5        <|end|>
    input    <|user|>  2      +      3       <|end|>  <|assistant|>  5
    target   2         +      3      <|end|> <|asst|> 5              <|end|>
    weight   0         0      0      0       0        1              1

The shift is done here, once, for supervised and for reinforcement learning alike. The losses sum
over tokens and datums; nothing is padded, and nothing is normalised.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from course_lib.config import PreferenceConfig, SFTConfig
from course_lib.errors import CourseError
from course_lib.rendering import Rendered

if TYPE_CHECKING:
    import tinker


def make_datum(rendered: Rendered, max_length: int | None = None) -> tinker.Datum:
    """A datum for the loss `cross_entropy`; `max_length` counts the tokens of the conversation.

    A longer one is refused, not cut: what would go is the end of the answer, and a model that
    never sees the end-of-turn token learns to go on for ever.
    """
    import tinker

    tokens, weights = rendered.tokens, rendered.weights
    place = rendered.source or "make_datum"
    if max_length is not None and len(tokens) > max_length:
        finding = f"the conversation has {len(tokens)} tokens, max_length is {max_length}"
        raise CourseError(place, finding, "shorten it, or raise max_length")
    if not any(weights[1:]):
        remedy = "render a conversation that has an answer after its first token"
        raise CourseError(place, "no token of it is trained on", remedy)
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": weights[1:]}
    return tinker.Datum(tinker.ModelInput.from_ints(tokens[:-1]), inputs)


def make_rl_datum(
    prompt_tokens: Sequence[int],
    completion_tokens: Sequence[int],
    logprobs: Sequence[float],
    advantages: Sequence[float],
) -> tinker.Datum:
    """A datum for `importance_sampling`, `ppo`, `cispo` ...: a prompt (P,) and its completion (C,).

    `logprobs` (C,) are those the sampler reported, `advantages` (C,) one per completion token. The
    prompt's targets get zeros: with an advantage of 0 they have no gradient.
    """
    import tinker

    n_read = len(prompt_tokens) - 1  # targets that belong to the prompt: the first token is none
    if n_read < 0 or len(completion_tokens) == 0:
        finding = f"{len(prompt_tokens)} prompt and {len(completion_tokens)} completion tokens"
        raise CourseError("make_rl_datum", finding, "give at least one of each")
    if not len(completion_tokens) == len(logprobs) == len(advantages):
        lengths = f"{len(completion_tokens)}, {len(logprobs)} and {len(advantages)}"
        finding = f"completion tokens, logprobs and advantages have lengths {lengths}"
        raise CourseError("make_rl_datum", finding, "give one logprob and advantage per token")
    tokens = [*prompt_tokens, *completion_tokens]
    inputs: dict[str, Any] = {
        "target_tokens": tokens[1:],
        "logprobs": [0.0] * n_read + list(logprobs),
        "advantages": [0.0] * n_read + list(advantages),
    }
    return tinker.Datum(tinker.ModelInput.from_ints(tokens[:-1]), inputs)


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers 0 ... n - 1, shuffled for this epoch and cut into batches.

    The partial batch at the end is dropped: its summed gradient is smaller than the others', and
    its mean loss noisier. Each epoch shuffles anew, so it is not always the same rows that are
    dropped. With fewer rows than one batch there is nothing to compare: they all make one batch.
    """
    if n < 1 or batch_size < 1:
        finding = f"{n} rows in batches of {batch_size}"
        raise CourseError(
            "epoch_batches", finding, "give at least one row and a batch_size above 0"
        )
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    batch_size = min(batch_size, n)
    return [order[i : i + batch_size] for i in range(0, n - batch_size + 1, batch_size)]


def plan_batches(n: int, config: SFTConfig | PreferenceConfig, seed: int) -> list[list[int]]:
    """The indices of every batch of every epoch, cut at `max_steps`."""
    batches = [
        batch
        for epoch in range(config.epochs)
        for batch in epoch_batches(n, config.batch_size, seed, epoch)
    ]
    return batches[: config.max_steps] if config.max_steps else batches
