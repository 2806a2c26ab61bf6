"""How is a batch decoded? Rows with the same weights advance together, one token a step.

A prompt is computed once, however many samples are asked of it. Its keys and values are then copied
for each of them, or lie there for all of them (see `cache`). Rows enter at any step. Those that
have ended leave several at a time: moving the others together costs as much as computing some rows
in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from course_lib.engine.cache import GroupedCache, SlabLayer, new_cache
from course_lib.engine.forwards import Forward, OnDemand
from course_lib.engine.picking import Drawing, top_entries, uniforms
from course_lib.engine.requests import SampledSequence, SampleRequest

DRAWS = 16  # random numbers of a row that are made at once
LEAVE_AT = 1 / 4  # of a batch's rows have ended: time to leave
PART_AT = 1 / 2  # the same where rows share their prompts, and leaving costs each a copy


@dataclass(eq=False)
class Row:
    """One sample being drawn; `start` is its first column in the batch's cache."""

    request: SampleRequest
    sample: int
    seed: int
    limit: int  # tokens at most
    stop_ids: frozenset[int]
    stop_text: Callable[[list[int]], bool] | None = None  # do the tokens so far hold a stop string?
    start: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]]] = field(default_factory=list)
    stop_reason: str = ""  # empty while the row lives

    def result(self) -> SampledSequence:
        topk = self.topk if self.request.topk_sample_logprobs else None
        return SampledSequence(self.tokens, self.logprobs, self.stop_reason, topk)


class Settings:
    """What the rows of a batch ask for, side by side; made anew when rows come or go.

    What changes from token to token is worked out for many at once: random numbers, and how many
    tokens nobody's limit ends.
    """

    def __init__(self, rows: list[Row], device: torch.device) -> None:
        requests = [row.request for row in rows]
        self.how = Drawing.of(
            [request.temperature for request in requests],
            [request.top_k for request in requests],
            [request.top_p for request in requests],
            device,
        )
        start = [row.start for row in rows]
        self.start = torch.tensor(start, device=device) if any(start) else None
        self.seeds = np.array([row.seed for row in rows], dtype=np.int64).view(np.uint64)
        self.counts = np.array([len(row.tokens) for row in rows])  # tokens drawn before these
        self.left = np.array([row.limit for row in rows]) - self.counts  # tokens that may come
        self.first_left = int(self.left.min())
        self.drawn = 0  # tokens since then
        stops = [*zip_longest(*(row.stop_ids for row in rows), fillvalue=-1)]  # -1: no token
        self.stop_ids = np.array(stops, dtype=np.int64).reshape(-1, len(rows))  # (most, B)
        self.text_rows = [i for i, row in enumerate(rows) if row.stop_text is not None]
        self.topk_rows = [i for i, request in enumerate(requests) if request.topk_sample_logprobs]
        self.watchers = [(row, row.request.on_token) for row in rows if row.request.on_token]

    @property
    def at_a_limit(self) -> bool:
        """Has a row as many tokens as it may have?"""
        return self.drawn >= self.first_left

    def draws(self) -> np.ndarray:
        """The next random number of each row (B,)."""
        column = self.drawn % DRAWS
        if not column:
            counts = self.counts + self.drawn + np.arange(DRAWS)[:, None]
            self._draws = uniforms(self.seeds, counts)  # (DRAWS, B)
        return self._draws[column]


def draw(logits: Tensor, rows: list[Row], settings: Settings) -> Tensor:
    """Give each row that lives its next token, from logits (B, V); returns the tokens (B,)."""
    probs = settings.how.probs(logits)  # (B, V)
    tokens = settings.how.pick(logits, probs, settings.draws())
    if settings.topk_rows:  # they ask for tokens that were not drawn, too
        logprobs = settings.how.tempered(logits).log_softmax(-1)  # finite, unlike probs.log()
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        for index in settings.topk_rows:
            row, its = rows[index], logprobs[index : index + 1]
            if not row.stop_reason:
                row.topk += top_entries(its, row.request.topk_sample_logprobs)
    else:
        chosen = probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log_()
    settings.drawn += 1
    for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
        if not row.stop_reason:
            row.tokens.append(token)
            row.logprobs.append(logprob)
    for row, on_token in settings.watchers:
        if not row.stop_reason:
            on_token(row.sample, row.tokens[-1], row.logprobs[-1])
    mark_ended(rows, settings, tokens.cpu().numpy())
    return tokens


def mark_ended(rows: list[Row], settings: Settings, tokens: np.ndarray) -> None:
    """Give a stop reason to each row whose newest token (B,) was its last."""
    live = np.array([not row.stop_reason for row in rows])
    if settings.at_a_limit:
        for index in np.flatnonzero((settings.drawn >= settings.left) & live):
            rows[index].stop_reason = "length"
    for index in np.flatnonzero((tokens == settings.stop_ids).any(axis=0) & live):
        rows[index].stop_reason = "stop"
    for index in settings.text_rows:
        row = rows[index]
        if live[index] and row.stop_text is not None and row.stop_text(row.tokens):
            row.stop_reason = "stop"


class Batch:
    """Rows that are decoded together with one set of weights."""

    def __init__(self, forward: Forward, weights: Any) -> None:
        self.forward = forward
        self.weights = weights
        self.rows: list[Row] = []
        self.ended = 0  # of them, which have not left yet
        self.whole = True  # are all rows there? Not where a change of the cache failed halfway
        self.cache: Cache | GroupedCache = new_cache()
        # Each row's newest token, which is not in the cache yet.
        self._last = torch.empty(0, dtype=torch.long, device=forward.device)
        self._settings: Settings | None = None

    @torch.inference_mode()
    def admit(
        self, prompts: list[np.ndarray], rows_of: list[list[Row]], every: bool
    ) -> list[OnDemand]:
        """Compute each prompt once and draw the first token of all its rows.

        Returns, with `every`, what gives the logits of each prompt (P, V).
        """
        self.drop_ended()
        device = self.forward.device
        cache = new_cache()
        last, whole = self.forward.prefill(self.weights, prompts, cache, every)
        rows = [row for group in rows_of for row in group]
        source = [index for index, group in enumerate(rows_of) for _ in group]
        drawn = draw(last[torch.tensor(source, device=device)], rows, Settings(rows, device))
        for row, index in zip(rows, source, strict=True):
            row.start = cache.get_seq_length() - len(prompts[index])
        alive = [index for index, row in enumerate(rows) if not row.stop_reason]
        self._settings, self.whole = None, False
        if self._may_share(len(alive) / len(rows)) and GroupedCache.pays(cache, source):
            self.cache, self._last = GroupedCache(cache, len(rows)), drawn
            self.rows, self.ended = rows, len(rows) - len(alive)
        elif alive:
            self._last = torch.cat([self._last, drawn[torch.tensor(alive, device=device)]])
            self._join(cache, [rows[i] for i in alive], [source[i] for i in alive])
        self.whole = True
        return whole

    def holds(self, rows: list[Row]) -> bool:
        """Is any of these rows here?"""
        return any(row in self.rows for row in rows)

    def _may_share(self, alive: float) -> bool:
        """May new rows, this part of which lives on, share their prompts?"""
        return self.forward.groups and not self.rows and alive > PART_AT

    def _join(self, cache: Cache, rows: list[Row], source: list[int]) -> None:
        """Append new rows with the columns of their prompts, so that all rows end in one column."""
        self._part_groups()
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

    def _part_groups(self) -> None:
        """Before rows come or go: each needs all of its columns for itself."""
        if isinstance(self.cache, GroupedCache):
            self.cache = self.cache.apart(torch.arange(len(self.rows), device=self.forward.device))

    @torch.inference_mode()
    def step(self) -> bool:
        """One token for every row. Did any end?"""
        settings = self._settings or Settings(self.rows, self.forward.device)
        self._settings = settings
        logits = self.forward.next(self.weights, self._last, settings.start, self.cache)
        self._last = draw(logits, self.rows, settings)
        before, self.ended = self.ended, sum(1 for row in self.rows if row.stop_reason)
        some_ended = self.ended > before
        # Whoever has ended and stays must not outgrow the model's context.
        leave_at = PART_AT if isinstance(self.cache, GroupedCache) else LEAVE_AT
        if self.ended >= leave_at * len(self.rows) or (self.ended and settings.at_a_limit):
            self.drop_ended()
        return some_ended

    @torch.inference_mode()
    def drop_ended(self) -> None:
        """Fill the places of ended rows with the last ones. Rows that share their prompts part."""
        alive = [index for index, row in enumerate(self.rows) if not row.stop_reason]
        count = len(alive)
        if count == len(self.rows):
            return
        if not count:
            self.rows, self.ended, self._settings, self._last = [], 0, None, self._last[:0]
            self.cache = new_cache()
            return
        self.whole = False
        holes = [index for index in range(count) if self.rows[index].stop_reason]
        tails = [index for index in alive if index >= count]
        order = list(range(count))
        for hole, tail in zip(holes, tails, strict=True):
            order[hole] = tail
        self.rows, self.ended = [self.rows[index] for index in order], 0
        self._settings = None
        device = self.forward.device
        self._last = self._last[torch.tensor(order, dtype=torch.long, device=device)]
        if isinstance(self.cache, GroupedCache):
            self.cache = self.cache.apart(torch.tensor(order, device=device))
        else:
            into, source = (torch.tensor(places, device=device) for places in (holes, tails))
            for layer in self.cache.layers:
                layer.keep(into, source, count)
        self._trim()
        self.whole = True

    def _trim(self) -> None:
        """Forget columns nobody looks at, where they are many."""
        unseen = min(row.start for row in self.rows)
        if unseen > self.cache.get_seq_length() // 2:
            for layer in self.cache.layers:
                layer.trim(unseen)
            for row in self.rows:
                row.start -= unseen
