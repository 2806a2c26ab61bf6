"""How is a token picked? From logits to one token for each row, with its log-probability.

The random stream of a row depends on its seed and on how many tokens it has drawn, on nothing else:
a row in a full batch draws the same numbers as alone. The stream is SplitMix64 (Steele, Lea and
Flood 2014), a hash of a counter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each row: draw number `counts` (B,) of the stream of `seeds` (B,)."""
    with np.errstate(over="ignore"):
        key = scramble(seeds.astype(np.uint64) + GOLDEN)
        bits = scramble(key + GOLDEN * (counts.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)) * 2.0**-53


def scramble(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def scaled_logprobs(logits: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(logits / T) (B, V) in float32; for T = 0 (greedy) that of T = 1."""
    divisor = torch.where(temperature > 0, temperature, 1.0).unsqueeze(-1)
    return torch.log_softmax(logits.float() / divisor, dim=-1)


def pick(
    logprobs: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, draws: np.ndarray
) -> Tensor:
    """One token for each row (B,), by inverse CDF: the first whose cumulated probability exceeds the draw.

    top_k and top_p cut the distribution that is drawn from, not the log-probabilities that are
    reported.
    """
    probs = logprobs.exp()  # (B, V)
    cut = ((top_k > 0) & (top_k < probs.shape[-1])) | (top_p < 1)
    if cut.any():
        probs[cut] = truncated(probs[cut], top_k[cut], top_p[cut])
    exact = torch.float32 if probs.device.type == "mps" else torch.float64
    cumulated = probs.cumsum(-1, dtype=exact)
    draws_B = torch.from_numpy(draws).to(cumulated)
    tokens = torch.searchsorted(cumulated, (draws_B * cumulated[:, -1]).unsqueeze(-1), right=True)
    tokens = tokens.squeeze(-1).clamp(max=probs.shape[-1] - 1)
    return torch.where(temperature > 0, tokens, logprobs.argmax(-1))


def truncated(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities (B, V) with zeros outside the k likeliest and outside the smallest set that reaches p."""
    ordered, index = probs.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    k = torch.where(top_k > 0, top_k, probs.shape[-1]).unsqueeze(-1)
    before = ordered.cumsum(-1) - ordered  # the mass that stands ahead of each token
    kept = (rank < k) & (before < top_p.unsqueeze(-1))
    return torch.zeros_like(probs).scatter(-1, index, ordered * kept)


def top_entries(logprobs: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k likeliest (token, logprob) of each row (B, V), best first."""
    values, ids = logprobs.topk(k, dim=-1)
    return [
        list(zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
