"""Learn from pairs: which of two replies to one prompt is better?

Two methods on the same data, both through `forward_backward_custom`, so they run wherever the SDK
does:

* a reward model (Bradley and Terry 1952; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155): a
  LoRA of its own. The strength of a reply is its probability of "yes" to "Is this a good reply?"
  ("verdict"), or the probability that it gives the reply itself ("reply");
* DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290): the policy itself is moved, no
  reward model. `dpo_nll` adds the chosen replies' negative log-likelihood (Pang et al. 2024,
  https://arxiv.org/abs/2404.19733), without which they may lose theirs with the rejected ones.

Left out: margins, ties, more than two replies. `judges` uses the reward model to score and to
compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.batches import make_datum, plan_batches
from course_lib.checkpoints import (
    Checkpoint,
    CheckpointLog,
    StepHook,
    StopTraining,
    save_checkpoint,
)
from course_lib.config import PreferenceConfig, find_file
from course_lib.conversations import Conversation, Message, sound_lines
from course_lib.environments import stands_aside
from course_lib.errors import CourseError
from course_lib.metrics import MetricsLog
from course_lib.rendering import Rendered, render_conversation, render_prompt

if TYPE_CHECKING:
    import tinker
    import torch

QUESTION = "Is this a good reply?"
YES = "yes"


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt, the better one first, and why it is better."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    why: str = ""

    @property
    def heldout(self) -> bool:
        """Whether the pair is kept for evaluation, as its last question is in the environments."""
        return stands_aside(self.prompt[-1].content)


@dataclass(frozen=True)
class PreferenceResult:
    """What training left behind."""

    checkpoints: list[Checkpoint]
    metrics: list[dict[str, Any]]
    stopped: bool = False


def load_pairs(path: str) -> list[Pair]:
    """Pairs from JSONL rows with `prompt`, `chosen` and `rejected` (and `why`)."""
    pairs = []
    remedy = "give a JSONL file of prompt, chosen and rejected"
    for place, row in sound_lines(str(find_file(path)), remedy):
        try:
            texts = [row[name] for name in ("prompt", "chosen", "rejected")]
        except (KeyError, TypeError):
            remedy = 'write {"prompt": "...", "chosen": "...", "rejected": "..."}'
            raise CourseError(place, "is no preference pair", remedy) from None
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise CourseError(place, "holds an empty or non-text part", "give texts")
        if texts[1] == texts[2]:
            raise CourseError(place, "chosen equals rejected", "leave the row out")
        prompt = (Message("user", texts[0]),)
        pairs.append(Pair(prompt, texts[1], texts[2], str(row.get("why", ""))))
    return pairs


def judgement(
    prompt: Sequence[Message], reply: str, tokenizer: Any, strength: str = "verdict"
) -> Rendered:
    """The text whose weighted logprobs, summed, are the log-strength of a reply.

    "verdict": the dialogue, the question whether the reply is good, and "yes", which alone counts.
    "reply": the dialogue, whose reply counts. A model that knows the world knows which replies are
    likely, so this judge starts with what the base model knows; but its strengths are no scores.
    """
    if strength == "reply":
        return render_conversation(Conversation((*prompt, Message("assistant", reply))), tokenizer)
    asked = (*prompt, Message("assistant", reply), Message("user", QUESTION))
    yes = tokenizer.encode(YES, add_special_tokens=False)[0]
    tokens = [*render_prompt(asked, tokenizer), yes]
    return Rendered(tokens, [0.0] * (len(tokens) - 1) + [1.0])


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log P(chosen beats rejected), mean over pairs; strengths are log p, shape (B,).

    P = p_chosen / (p_chosen + p_rejected) = sigmoid(log p_chosen - log p_rejected).
    """
    import torch

    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def dpo_loss(chosen_gain: torch.Tensor, rejected_gain: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * (gain of chosen - gain of rejected)), mean over pairs (equation 7).

    A gain (B,) is how much likelier a reply is than under the reference: the difference of the
    summed logprobs. The loss only sees the difference: both replies may become less likely
    together.
    """
    import torch

    return -torch.nn.functional.logsigmoid(beta * (chosen_gain - rejected_gain)).mean()


def train_reward_model(
    client: tinker.TrainingClient,
    pairs: list[Pair],
    config: PreferenceConfig,
    *,
    tokenizer: Any,
    out: Path | None = None,
    seed: int = 0,
    on_step: StepHook | None = None,
) -> PreferenceResult:
    """Teach `client` to find the better reply of each pair stronger, by `config.strength`."""
    import torch

    datums_2 = _datums(pairs, tokenizer, config.strength)

    def bradley_terry(
        batch: list[int], data: list[tinker.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        # (2B,), chosen and rejected in turn
        strengths = torch.stack([_summed(*each) for each in zip(data, logprobs, strict=True)])
        loss = bradley_terry_loss(strengths[0::2], strengths[1::2])
        return loss, _pair_metrics(loss, strengths[0::2] - strengths[1::2])

    return _train_on_pairs(
        client, datums_2, bradley_terry, "preference", config, out, seed, on_step
    )


def train_dpo(
    client: tinker.TrainingClient,
    pairs: list[Pair],
    config: PreferenceConfig,
    *,
    tokenizer: Any,
    out: Path | None = None,
    seed: int = 0,
    on_step: StepHook | None = None,
) -> PreferenceResult:
    """Move the policy itself towards the better replies; the reference is `client` as given."""
    import torch

    datums_2 = _datums(pairs, tokenizer, "reply")
    flat = [datum for both in datums_2 for datum in both]
    before = client.forward(flat, "cross_entropy").result().loss_fn_outputs
    reference_2N = torch.stack(
        [
            _summed(datum, torch.tensor(output["logprobs"].data))
            for datum, output in zip(flat, before, strict=True)
        ]
    )

    n_counted_2N = torch.tensor([sum(datum.loss_fn_inputs["weights"].data) for datum in flat])

    def dpo(
        batch: list[int], data: list[tinker.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        policy = torch.stack([_summed(*each) for each in zip(data, logprobs, strict=True)])  # (2B,)
        rows = [row for index in batch for row in (2 * index, 2 * index + 1)]
        gains = policy - reference_2N[rows].to(policy.dtype)
        nll = -(policy[0::2] / n_counted_2N[rows][0::2].to(policy.dtype)).mean()  # nats per token
        loss = dpo_loss(gains[0::2], gains[1::2], config.dpo_beta) + config.dpo_nll * nll
        metrics = _pair_metrics(loss, config.dpo_beta * (gains[0::2] - gains[1::2]))
        metrics["preference/chosen_gain"] = float(gains[0::2].detach().mean())
        metrics["preference/rejected_gain"] = float(gains[1::2].detach().mean())
        metrics["preference/chosen_nll"] = float(nll.detach())
        return loss, metrics

    return _train_on_pairs(client, datums_2, dpo, "dpo", config, out, seed, on_step)


def calibration(probabilities: Sequence[float], bins: int = 5) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, count) by confidence, from 0.5 to 1; empty bins are left out.

    A pair is decided for the reply that is likelier to win; it is right if that is the chosen one.
    Of a calibrated judge's decisions at confidence 0.8, 80 % are right; one at 0.5 is half right.
    """
    rows: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for probability in probabilities:
        confidence = max(probability, 1 - probability)
        slot = min(bins - 1, int((confidence - 0.5) * 2 * bins))
        right = 0.5 if probability == 0.5 else float(probability > 0.5)
        rows[slot].append((confidence, right))
    return [
        (sum(c for c, _ in row) / len(row), sum(r for _, r in row) / len(row), len(row))
        for row in rows
        if row
    ]


def _datums(pairs: list[Pair], tokenizer: Any, strength: str) -> list[list[tinker.Datum]]:
    """The judgements of each pair's two replies, the chosen one first."""
    if not pairs:
        remedy = "give at least one, for instance with load_pairs"
        raise CourseError("pairs", "there is none to learn from", remedy)
    return [
        [
            make_datum(judgement(pair.prompt, reply, tokenizer, strength))
            for reply in (pair.chosen, pair.rejected)
        ]
        for pair in pairs
    ]


def _train_on_pairs(
    client: tinker.TrainingClient,
    datums_2: list[list[tinker.Datum]],
    loss: Callable[[list[int], list[tinker.Datum], list[torch.Tensor]], Any],
    phase: str,
    config: PreferenceConfig,
    out: Path | None,
    seed: int,
    on_step: StepHook | None,
) -> PreferenceResult:
    """The loop that both methods share: a batch of pairs, a custom loss, a step."""
    import tinker

    batches = plan_batches(len(datums_2), config, seed)
    log = MetricsLog(out / "metrics.jsonl") if out else None
    rows: list[dict[str, Any]] = []
    for step, batch in enumerate(batches, start=1):
        began = time.monotonic()
        datums = [datum for index in batch for datum in datums_2[index]]
        backward = client.forward_backward_custom(datums, partial(loss, batch))
        rate = config.learning_rate * (1 - (step - 1) / len(batches))
        update = client.optim_step(tinker.AdamParams(learning_rate=rate))
        found = backward.result().metrics
        update.result()
        metrics: dict[str, Any] = {"phase": phase, "optim/lr": rate}
        metrics |= {name: value for name, value in found.items() if "/" in name}
        metrics["time/total"] = time.monotonic() - began
        rows.append({"step": step, **metrics})
        if log:
            log.write(step, metrics)
        if on_step:
            try:
                on_step(step, len(batches), metrics)
            except StopTraining:
                return PreferenceResult([], rows, stopped=True)
    checkpoint = save_checkpoint(client, phase, len(rows), CheckpointLog(out) if out else None)
    return PreferenceResult([checkpoint], rows)


def _pair_metrics(loss: torch.Tensor, margins: torch.Tensor) -> dict[str, float]:
    return {
        "train/loss": float(loss.detach()),
        "preference/accuracy": float((margins > 0).double().mean()),
        "preference/margin": float(margins.detach().mean()),
    }


def _summed(datum: tinker.Datum, logprobs: torch.Tensor) -> torch.Tensor:
    """The logprob of what counts in a datum: the sum over its tokens, by weight."""
    weights = logprobs.new_tensor(list(datum.loss_fn_inputs["weights"].data))
    return (weights * logprobs).sum()
