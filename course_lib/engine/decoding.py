"""How is a batch decoded? Rows with the same weights advance together, one token a step.

A prompt is computed once, however many samples are asked of it; its keys and values are then copied
for each of them. Rows enter at any step and leave when they end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from course_lib.engine.cache import SlabLayer, new_cache
from course_lib.engine.forwards import Forward
from course_lib.engine.picking import Drawing, top_entries, uniforms
from course_lib.engine.requests import SampledSequence, SampleRequest


@dataclass(eq=False)
class Row:
    """One sample being drawn; `start` is its first column in the batch's cache."""

    request: SampleRequest
    sample: int
    seed: int
    limit: int  # tokens at most
    stops: Callable[[list[int]], bool]
    start: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]]] = field(default_factory=list)
    stop_reason: str = ""  # empty while the row lives

    def take(self, token: int, logprob: float) -> None:
        """Append a token, and end when it is a stop or the last one allowed."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.request.on_token is not None:
            self.request.on_token(self.sample, token, logprob)
        if self.stops(self.tokens):
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.stop_reason = "length"

    def result(self) -> SampledSequence:
        topk = self.topk if self.request.topk_sample_logprobs else None
        return SampledSequence(self.tokens, self.logprobs, self.stop_reason, topk)


@dataclass(frozen=True)
class Settings:
    """How each row of a batch draws, as tensors (B,); rebuilt when rows come or go."""

    how: Drawing
    seeds: np.ndarray
    start: Tensor | None  # first column of each row, None if 0 for all
    with_topk: list[int]  # the rows that want their likeliest tokens told

    @classmethod
    def of(cls, rows: list[Row], device: torch.device) -> Settings:
        requests = [row.request for row in rows]
        start = [row.start for row in rows]
        return cls(
            Drawing.of(
                [request.temperature for request in requests],
                [request.top_k for request in requests],
                [request.top_p for request in requests],
                device,
            ),
            np.array([row.seed for row in rows], dtype=np.int64).view(np.uint64),
            torch.tensor(start, device=device) if any(start) else None,
            [index for index, request in enumerate(requests) if request.topk_sample_logprobs],
        )


def draw(logits: Tensor, rows: list[Row], settings: Settings) -> Tensor:
    """Give each row its next token, from logits (B, V); returns the tokens (B,)."""
    logprobs = settings.how.logprobs(logits)  # (B, V)
    counts = np.array([len(row.tokens) for row in rows])
    tokens = settings.how.pick(logprobs, uniforms(settings.seeds, counts))
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    for index in settings.with_topk:
        row = rows[index]
        row.topk += top_entries(logprobs[index : index + 1], row.request.topk_sample_logprobs)
    for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
        row.take(token, logprob)
    return tokens


class Batch:
    """Rows that are decoded together with one set of weights."""

    def __init__(self, forward: Forward, weights: Any) -> None:
        self.forward = forward
        self.weights = weights
        self.rows: list[Row] = []
        self.cache = new_cache()
        # Each row's newest token, which is not in the cache yet.
        self._last = torch.empty(0, dtype=torch.long, device=forward.device)
        self._settings: Settings | None = None

    @torch.inference_mode()
    def admit(self, prompts: list[np.ndarray], rows_of: list[list[Row]], every: bool) -> Tensor:
        """Compute each prompt once and draw the first token of all its rows.

        Returns the prompts' logits, (prompts, V) or with `every` (prompts, P, V); shorter prompts
        are padded on the left.
        """
        device = self.forward.device
        length = max(len(prompt) for prompt in prompts)
        padding = [length - len(prompt) for prompt in prompts]
        tokens = torch.zeros(len(prompts), length, dtype=torch.long)
        for into, prompt, skipped in zip(tokens, prompts, padding, strict=True):
            into[skipped:] = torch.from_numpy(prompt)
        start = torch.tensor(padding, device=device) if any(padding) else None
        cache = new_cache()
        logits = self.forward(self.weights, tokens.to(device), start, cache, every)
        rows = [row for group in rows_of for row in group]
        source = [index for index, group in enumerate(rows_of) for _ in group]
        last = logits[:, -1] if every else logits
        drawn = draw(last[torch.tensor(source, device=device)], rows, Settings.of(rows, device))
        for row, index in zip(rows, source, strict=True):
            row.start = padding[index]
        alive = [index for index, row in enumerate(rows) if not row.stop_reason]
        if alive:
            self._last = torch.cat([self._last, drawn[torch.tensor(alive, device=device)]])
            self._join(cache, [rows[i] for i in alive], [source[i] for i in alive])
        return logits

    def _join(self, cache: Cache, rows: list[Row], source: list[int]) -> None:
        """Append new rows with the columns of their prompts, so that all rows end in one column."""
        if not self.rows:
            self.cache = new_cache()
        new, old = cache.get_seq_length(), self.cache.get_seq_length()
        index = torch.tensor(source, device=self.forward.device)
        while len(self.cache.layers) < len(cache.layers):
            self.cache.layers.append(SlabLayer())
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            mine.admit(theirs, index)
        for moved, shift in ((self.rows, max(0, new - old)), (rows, max(0, old - new))):
            for row in moved:
                row.start += shift
        self.rows = self.rows + rows
        self._settings = None

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every row; rows that end leave the batch."""
        if self._settings is None:
            self._settings = Settings.of(self.rows, self.forward.device)
        tokens = self._last.unsqueeze(-1)
        logits = self.forward(self.weights, tokens, self._settings.start, self.cache)
        self._last = draw(logits, self.rows, self._settings)
        self.drop_ended()

    @torch.inference_mode()
    def drop_ended(self) -> None:
        """Fill the places of ended rows with the last ones; forget columns nobody looks at."""
        alive = [index for index, row in enumerate(self.rows) if not row.stop_reason]
        count = len(alive)
        if count == len(self.rows):
            return
        holes = [index for index in range(count) if self.rows[index].stop_reason]
        tails = [index for index in alive if index >= count]
        order = list(range(count))
        for hole, tail in zip(holes, tails, strict=True):
            order[hole] = tail
        self.rows = [self.rows[index] for index in order]
        self._settings = None
        device = self.forward.device
        self._last = self._last[torch.tensor(order, dtype=torch.long, device=device)]
        into, source = (torch.tensor(places, device=device) for places in (holes, tails))
        unseen = min((row.start for row in self.rows), default=0)
        trims = unseen > self.cache.get_seq_length() // 2
        for layer in self.cache.layers:
            layer.keep(into, source, count)
            if trims:
                layer.trim(unseen)
        for row in self.rows if trims else ():
            row.start -= unseen
