"""What is asked of the compute rooms and what they answer: plain data, no HTTP, no weights.

`wire` turns HTTP bodies into these, `worker` hands them on, `trainer` and `sampler` work on them.
Arrays are numpy, so that a body crosses from protobuf to torch without per-token Python.

Legend: N tokens of one datum, K target columns, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# How an error ends that finds numbers which are none.
BLOWN_UP = "training has blown up; go back to an earlier checkpoint, and take a lower learning rate"


class RequestError(Exception):
    """A request that cannot be carried out: one sentence for the person who sent it."""


class NotFoundError(RequestError):
    """What was asked for is not there, or is another owner's."""


@dataclass(frozen=True)
class LoraSpec:
    """Which adapter to make; the names are the SDK's (`tinker.types.LoraConfig`)."""

    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True


@dataclass(frozen=True)
class TrainDatum:
    """One training sequence: `tokens` (N,) int64 and its loss inputs, each (N,) or (N, K)."""

    tokens: np.ndarray
    loss_fn_inputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainRequest:
    """One `forward` or `forward_backward` chunk."""

    data: list[TrainDatum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = field(default_factory=dict)
    forward_only: bool = False


@dataclass(frozen=True)
class TrainResult:
    """Per datum the arrays (`logprobs`: (N,) or (N, K)), and the metrics (`loss:sum` ...)."""

    loss_fn_outputs: list[dict[str, np.ndarray]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class AdamParams:
    """Arrives with every optimizer step; defaults are the SDK's."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # global norm; 0 = no clipping


@dataclass(frozen=True)
class SampleRequest:
    """One `sample` call: `num_samples` completions of one prompt.

    `stop` None keeps the end-of-text token as the stop; an empty list turns every stop off.
    """

    prompt: np.ndarray  # (P,) int64
    num_samples: int = 1
    max_tokens: int | None = None  # None: up to the context length
    temperature: float = 1.0
    top_k: int = -1  # -1 or 0 = off
    top_p: float = 1.0
    seed: int | None = None  # sample i uses seed + i
    stop: str | list[str] | list[int] | None = None
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: np.ndarray | None = None  # (P - 1, K) token ids, -1 = empty cell
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    cancelled: Callable[[], bool] = lambda: False  # asked between decode steps
    on_token: Callable[[int, int, float], None] | None = None  # sample, token, logprob: streaming


@dataclass
class SampledSequence:
    """One completion: `tokens` (C,) with the stop token, their logprobs (C,), why it ended."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str  # "stop" | "length"
    topk: list[list[tuple[int, float]]] | None = None  # per token, best first


@dataclass
class SampleResult:
    """What one `SampleRequest` gave. `prompt_logprobs[0]` is NaN: nothing precedes it."""

    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None  # (P,) float32
    topk_prompt: list[list[tuple[int, float]]] | None = None  # (P) rows, row 0 empty
    target_prompt: np.ndarray | None = None  # (P - 1, K)
    alt_tokens: tuple[np.ndarray, np.ndarray] | None = None  # ids and logprobs, each (P - 1, k)
