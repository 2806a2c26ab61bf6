"""Supervised fine-tuning: raise the log-probability of the answers in the data, a batch at a time.

    client = service.create_lora_training_client(service.base_model, rank=16).result()
    result = train_sft(client, conversations, SFTConfig(batch_size=8),
    tokenizer=client.get_tokenizer())

The order of the data follows from (seed, epoch), so a killed run goes on from its last checkpoint
exactly as if nothing had happened. Not here: evaluation by sampling (`evaluation`), and anything
about the model itself.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
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
from course_lib.config import RLConfig, SFTConfig
from course_lib.conversations import Conversation
from course_lib.evaluation import nll, token_weight
from course_lib.metrics import MetricsLog
from course_lib.rendering import render_conversation

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True)
class SFTResult:
    """What training left behind: checkpoints, one metrics row per step, and whether it was
    stopped.
    """

    checkpoints: list[Checkpoint]
    metrics: list[dict[str, Any]]
    stopped: bool = False

    @property
    def losses(self) -> list[float]:
        """The training NLL of each step, in nats per trained-on token."""
        return [row["train/nll"] for row in self.metrics]


def train_sft(
    client: tinker.TrainingClient,
    data: list[Conversation],
    config: SFTConfig,
    *,
    tokenizer: Any,
    heldout: list[Conversation] | None = None,
    out: Path | None = None,
    seed: int = 0,
    resume: Checkpoint | None = None,
    on_step: StepHook | None = None,
) -> SFTResult:
    """Train `client` on the conversations; go on after `resume`, whose weights `client` holds.

    With `out`, metrics and checkpoints are logged in that folder.
    """
    import tinker

    datums = sft_datums(data, config, tokenizer)
    heldout_datums = sft_datums(heldout, config, tokenizer) if heldout else []
    batches = plan_batches(len(datums), config, seed)
    total = len(batches)
    start = resume.step if resume else 0
    metrics_log = MetricsLog(out / "metrics.jsonl") if out else None
    checkpoint_log = CheckpointLog(out) if out else None
    checkpoints: list[Checkpoint] = [resume] if resume else []
    rows: list[dict[str, Any]] = []
    stopped = False

    for step in range(start + 1, total + 1):
        began = time.monotonic()
        batch = [datums[index] for index in batches[step - 1]]
        learning_rate = scheduled_rate(step, total, config)

        # Both calls are on their way before either is awaited: the server never waits for us.
        backward = client.forward_backward(batch, "cross_entropy")
        update = client.optim_step(tinker.AdamParams(learning_rate=learning_rate))
        loss = backward.result().metrics["loss:sum"]  # sum of -weight * logprob over the batch
        update_metrics = update.result().metrics or {}

        tokens = token_weight(batch)
        metrics: dict[str, Any] = {
            "phase": "sft",
            "train/nll": loss / tokens,
            "train/tokens": tokens,
            "optim/lr": learning_rate,
            "progress/epoch": step / max(1, len(datums) // config.batch_size),
            "progress/done_frac": step / total,
            **renamed(update_metrics, "optim/"),
        }
        last = step == total
        if heldout_datums and (last or _due(step, config.eval_every)):
            metrics["test/nll"] = nll(client, heldout_datums)
        metrics["time/total"] = time.monotonic() - began
        rows.append({"step": step, **metrics})
        if metrics_log:
            metrics_log.write(step, **metrics)
        if on_step:
            try:
                on_step(step, total, metrics)
            except StopTraining:
                stopped = True
        if last or stopped or _due(step, config.save_every):
            checkpoints.append(save_checkpoint(client, "sft", step, checkpoint_log))
        if stopped:
            break
    return SFTResult(checkpoints, rows, stopped)


def sft_datums(
    conversations: list[Conversation], config: SFTConfig, tokenizer: Any
) -> list[tinker.Datum]:
    """Conversations as training data; one over `max_length` is an error that names its place."""
    rendered = (render_conversation(each, tokenizer, config.train_on) for each in conversations)
    return [make_datum(each, config.max_length) for each in rendered]


def scheduled_rate(step: int, total: int, config: SFTConfig | RLConfig) -> float:
    """The learning rate of step 1..total: constant, or falling to 0 after the last.

    >>> [scheduled_rate(step, 4, SFTConfig(learning_rate=0.1)) for step in (1, 2, 3, 4)]
    [0.1, 0.07500000000000001, 0.05, 0.025]
    """
    done = (step - 1) / total
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    if config.schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate


def renamed(server_metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The server's `name:reduction` metrics under a group: grad_norm:mean -> optim/grad_norm."""
    return {prefix + name.split(":")[0]: value for name, value in server_metrics.items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
