"""How is a token picked? From logits to probabilities, to one token for each row.

The random stream of a row depends on its seed and on how many tokens it has drawn, on nothing else:
a row in a full batch draws the same numbers as alone. The stream is SplitMix64 (Steele, Lea and
Flood 2014), a hash of a counter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLDEST = 1e-6  # a temperature below draws the likeliest token, too
MOST = 2**31  # more tokens than any vocabulary has
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1): number `counts` of the stream of `seeds`, of shapes that go together."""
    with np.errstate(over="ignore"):
        key = scramble(seeds.astype(np.uint64) + GOLDEN)
        bits = scramble(key + GOLDEN * (counts.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)) * 2.0**-53


def scramble(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Drawing:
    """How the rows of a batch draw: settings (B,), and what of it no row needs."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    scaled: bool  # some temperature is not 1
    greedy: bool  # some temperature is 0
    cut: Tensor | None  # the rows that top_k or top_p restricts

    @classmethod
    def of(
        cls,
        temperature: list[float],
        top_k: list[int],
        top_p: list[float],
        device: torch.device,
    ) -> Drawing:
        # What float32 and int64 cannot hold; neither bound changes what is drawn.
        temperature = [max(value, COLDEST) if value else 0.0 for value in temperature]
        top_p = [max(value, COLDEST) for value in top_p]
        top_k = [min(value, MOST) for value in top_k]
        cut = [row for row in range(len(top_k)) if top_k[row] > 0 or top_p[row] < 1]
        return cls(
            torch.tensor(temperature, dtype=torch.float32, device=device),
            torch.tensor(top_k, device=device),
            torch.tensor(top_p, dtype=torch.float32, device=device),
            any(value not in (0, 1) for value in temperature),
            0 in temperature,
            torch.tensor(cut, device=device) if cut else None,
        )

    def tempered(self, logits: Tensor) -> Tensor:
        """logits / T (B, V) in float32; for T = 0 (greedy) those of T = 1."""
        logits = logits.float()
        if self.scaled:
            divisor = torch.where(self.temperature > 0, self.temperature, 1.0)
            logits = logits / divisor.unsqueeze(-1)
        return logits

    def probs(self, logits: Tensor) -> Tensor:
        """softmax(logits / T) (B, V). Far below the likeliest token it is 0, at low T soon."""
        return torch.softmax(self.tempered(logits), dim=-1)

    def pick(self, logits: Tensor, probs: Tensor, draws: np.ndarray) -> Tensor:
        """For each draw, (B,) or several of a row (B, K), a token: the first whose cumulated
        probability passes it.

        top_k and top_p cut what is drawn from, not `probs`. Greedy rows take the largest logit.
        """
        if self.cut is not None:
            rows = self.cut
            kept = truncated(logits[rows], probs[rows], self.top_k[rows], self.top_p[rows])
            probs = probs.index_copy(0, rows, kept)
        exact = torch.float32 if probs.device.type == "mps" else torch.float64
        cumulated = probs.cumsum(-1, dtype=exact)
        total = cumulated[:, -1:]
        thresholds = torch.from_numpy(draws.reshape(len(draws), -1)).to(total) * total
        tokens = torch.searchsorted(cumulated, thresholds, right=True)
        tokens.clamp_(max=probs.shape[-1] - 1)  # where the probabilities are not numbers
        if self.greedy:
            drawn = self.temperature.unsqueeze(-1) > 0
            tokens = torch.where(drawn, tokens, logits.argmax(-1, keepdim=True))
        return tokens.reshape(draws.shape)


def truncated(logits: Tensor, probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities (B, V), zero outside the k likeliest and the smallest set that reaches p.

    The logits tell which are likelier: at a high temperature all probabilities round to the same.
    """
    index = logits.sort(stable=True, dim=-1, descending=True).indices
    ordered = probs.gather(-1, index)
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
