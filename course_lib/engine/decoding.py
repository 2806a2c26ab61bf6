"""How is a batch decoded? Rows with the same weights advance together, one token a step.

A prompt is computed once, however many samples are asked of it; its keys and values are then copied
for each of them. Rows enter at any step and leave when they end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from course_lib.engine.cache import SlabLayer, new_cache
from course_lib.engine.picking import pick, scaled_logprobs, top_entries, uniforms
from course_lib.engine.requests import SampledSequence, SampleRequest


class PlainModel:
    """The base model as sampling sees it: no adapters, but weights that can be exchanged for folded ones."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device
        self._worn: dict[str, Tensor] = {}
        self._original: dict[str, Tensor] = {}

    def wear(self, folded: dict[str, Tensor]) -> None:
        """Compute with these weights in place of the base model's; {} gives the base model."""
        if folded is self._worn:
            return
        for name, weight in (self._original | folded).items():
            module_name, _, parameter = name.rpartition(".")
            module = self.model.get_submodule(module_name)
            self._original.setdefault(name, module._parameters[parameter])
            module._parameters[parameter] = weight
        self._worn = folded

    def forward(self, tokens: Tensor, start: Tensor, cache, every: bool = False) -> Tensor:
        """Logits after the last column (B, V), or after every one (B, Q, V), of tokens (B, Q).

        Row b's first token stands in column `start[b]` of the cache; columns before it are padding.
        """
        past = cache.get_seq_length()
        columns = torch.arange(past + tokens.shape[1], device=tokens.device)
        mask = None
        if int(start.max()) > 0:
            mask = (columns >= start.unsqueeze(-1)).long()  # (B, columns)
        positions = (columns[past:] - start.unsqueeze(-1)).clamp(min=0)  # (B, Q)
        logits = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if every else 1,
        ).logits
        return logits if every else logits[:, -1]


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
    """How each row of a batch draws, as tensors (B,)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seeds: np.ndarray
    start: Tensor

    @classmethod
    def of(cls, rows: list[Row], device: torch.device) -> Settings:
        def column(name: str, dtype: torch.dtype) -> Tensor:
            values = [getattr(row.request, name) for row in rows]
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            column("temperature", torch.float32),
            column("top_k", torch.long),
            column("top_p", torch.float32),
            np.array([row.seed for row in rows], dtype=np.int64).view(np.uint64),
            torch.tensor([row.start for row in rows], device=device),
        )


def draw(logits: Tensor, rows: list[Row], settings: Settings) -> Tensor:
    """Give each row its next token, from logits (B, V); returns the tokens (B,)."""
    logprobs = scaled_logprobs(logits, settings.temperature)  # (B, V)
    counts = np.array([len(row.tokens) for row in rows])
    draws = uniforms(settings.seeds, counts)
    tokens = pick(logprobs, settings.temperature, settings.top_k, settings.top_p, draws)
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    for index, row in enumerate(rows):
        if row.request.topk_sample_logprobs:
            row.topk += top_entries(logprobs[index : index + 1], row.request.topk_sample_logprobs)
    for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
        row.take(token, logprob)
    return tokens


class Batch:
    """Rows that are decoded together with one set of weights."""

    def __init__(self, model: PlainModel, folded: dict[str, Tensor]) -> None:
        self.model = model
        self.folded = folded
        self.rows: list[Row] = []
        self.cache = new_cache()
        self._last = torch.empty(
            0, dtype=torch.long
        )  # each row's newest token, not yet in the cache
        self._settings: Settings | None = None

    @torch.inference_mode()
    def admit(self, prompts: list[np.ndarray], rows_of: list[list[Row]], every: bool) -> Tensor:
        """Compute each prompt once and draw the first token of all its rows.

        Returns the prompts' logits, (prompts, V) or with `every` (prompts, P, V); prompts stand on
        the right.
        """
        self.model.wear(self.folded)
        device = self.model.device
        length = max(len(prompt) for prompt in prompts)
        tokens = torch.zeros(len(prompts), length, dtype=torch.long)
        for into, prompt in zip(tokens, prompts, strict=True):
            into[length - len(prompt) :] = torch.from_numpy(prompt)
        start = torch.tensor([length - len(prompt) for prompt in prompts], device=device)
        cache = new_cache()
        logits = self.model.forward(tokens.to(device), start, cache, every)
        rows = [row for group in rows_of for row in group]
        source = [index for index, group in enumerate(rows_of) for _ in group]
        last = logits[:, -1] if every else logits
        drawn = draw(last[source], rows, Settings.of(rows, device))
        alive = [index for index, row in enumerate(rows) if not row.stop_reason]
        if alive:
            self._join(
                cache, [rows[i] for i in alive], [source[i] for i in alive], start, drawn[alive]
            )
        return logits

    def _join(
        self, cache: Cache, rows: list[Row], source: list[int], start: Tensor, last: Tensor
    ) -> None:
        """Append new rows, whose prompts end at the cache's present column."""
        length = cache.get_seq_length()
        before = self.cache.get_seq_length() if self.rows else 0
        if not self.rows:
            self.cache = new_cache()
        while len(self.cache.layers) < len(cache.layers):
            self.cache.layers.append(SlabLayer())
        index = torch.tensor(source, device=start.device)
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            mine.admit(theirs, index)
        for row in self.rows:
            row.start += max(0, length - before)
        for row, column in zip(rows, start[index].tolist(), strict=True):
            row.start = max(length, before) - length + column
        self._last = torch.cat([self._last.to(last.device), last])
        self.rows = self.rows + rows
        self._settings = None

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every row; rows that end leave the batch."""
        self.model.wear(self.folded)
        if self._settings is None:
            self._settings = Settings.of(self.rows, self.model.device)
        logits = self.model.forward(self._last.unsqueeze(-1), self._settings.start, self.cache)
        self._last = draw(logits, self.rows, self._settings)
        self.drop_ended()

    @torch.inference_mode()
    def drop_ended(self) -> None:
        """Close the gaps of ended rows with the last ones, and forget columns nobody looks at."""
        alive = [index for index, row in enumerate(self.rows) if not row.stop_reason]
        count = len(alive)
        if count == len(self.rows):
            return
        holes = [index for index in range(count) if self.rows[index].stop_reason]
        tails = [index for index in alive if index >= count]
        order = list(range(count))
        for hole, tail in zip(holes, tails, strict=True):
            order[hole] = tail
        device = self.model.device
        for layer in self.cache.layers:
            layer.keep(
                torch.tensor(holes, device=device), torch.tensor(tails, device=device), count
            )
        self.rows = [self.rows[index] for index in order]
        self._last = self._last[torch.tensor(order, dtype=torch.long, device=device)]
        self._settings = None
        unseen = min((row.start for row in self.rows), default=0)
        if unseen > self.cache.get_seq_length() // 2:
            for layer in self.cache.layers:
                layer.trim(unseen)
            for row in self.rows:
                row.start -= unseen
