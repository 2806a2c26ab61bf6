"""Which forward pass gives the next logits? Two, with the same results, behind one method.

`GeneralForward` runs any Hugging Face causal LM; `LlamaForward` the faster pass of `llama`. Both
compute with weights that an adapter has been folded into, and write to the same key-value cache.

Legend: B rows, P tokens of a prompt, L columns in all, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from course_lib.engine.attention import Attention, attend
from course_lib.engine.cache import GroupedCache
from course_lib.engine.llama import Llama, Weights
from course_lib.engine.lora import Folding, sharing_copy
from course_lib.engine.packing import pack

MASKED = -1e30  # not minus infinity: a padded column sees nothing, and its softmax must stay finite
OnDemand = Callable[[], Tensor]


class Forward(Protocol):
    """What decoding needs from a model."""

    device: torch.device
    groups: bool  # does it take a `GroupedCache`, too?

    def prepare(self, state: dict[str, Tensor] | None) -> Any:
        """Weights with an adapter's tensors folded in; None for the bare base model."""
        ...

    def nbytes(self, weights: Any) -> int:
        """What prepared weights take in memory, beside the base model."""
        ...

    def prefill(
        self, weights: Any, prompts: list[np.ndarray], cache: Cache, every: bool = False
    ) -> tuple[Tensor, list[OnDemand]]:
        """Logits after each prompt's last token (B, V), and with `every` for each prompt what gives
        those after all of its tokens (P, V): a copy, so they are asked for one after the other.

        In the cache, which was empty, they end in the same column: shorter ones are padded on the
        left.
        """
        ...

    def next(self, weights: Any, tokens: Tensor, start: Tensor | None, cache: Cache) -> Tensor:
        """Logits after one token more for each row (B,): (B, V).

        Row b's first token stands in column `start[b]` of the cache, and what is left of it is
        padding; None means that no row has any.
        """
        ...


class GeneralForward:
    """Any causal LM, its weights exchanged for the folded ones."""

    groups = False

    def __init__(self, model: PreTrainedModel, folding: Folding) -> None:
        self.model = sharing_copy(model)  # `folding` needs the original weights
        self.device = model.device
        self.folding = folding
        self._worn: dict[str, Tensor] = {}
        self._original: dict[str, Tensor | None] = {}

    def prepare(self, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return {} if state is None else self.folding.fold(state)

    def nbytes(self, weights: dict[str, Tensor]) -> int:
        return sum(tensor.nbytes for tensor in weights.values())

    def _wear(self, folded: dict[str, Tensor]) -> None:
        if folded is self._worn:
            return
        for name, weight in (self._original | folded).items():
            module_name, _, parameter = name.rpartition(".")
            module = self.model.get_submodule(module_name)
            self._original.setdefault(name, module._parameters[parameter])
            module._parameters[parameter] = weight  # type: ignore[assignment]
        self._worn = folded

    def prefill(
        self,
        weights: dict[str, Tensor],
        prompts: list[np.ndarray],
        cache: Cache,
        every: bool = False,
    ) -> tuple[Tensor, list[OnDemand]]:
        real = ending_together(prompts)
        tokens = np.zeros(real.shape, dtype=np.int64)
        tokens[real] = np.concatenate(prompts)
        start = None if real.all() else torch.from_numpy((~real).sum(axis=1)).to(self.device)
        logits = self._logits(
            weights, torch.from_numpy(tokens).to(self.device), start, cache, to_keep=1 - every
        )
        if not every:
            return logits[:, -1], []
        rows = zip(logits, prompts, strict=True)
        return logits[:, -1], [partial(row.narrow, 0, -len(p), len(p)) for row, p in rows]

    def next(
        self, weights: dict[str, Tensor], tokens: Tensor, start: Tensor | None, cache: Cache
    ) -> Tensor:
        return self._logits(weights, tokens.unsqueeze(-1), start, cache, to_keep=1)[:, -1]

    def _logits(
        self,
        weights: dict[str, Tensor],
        tokens: Tensor,
        start: Tensor | None,
        cache: Cache,
        to_keep: int,
    ) -> Tensor:
        """Of tokens (B, Q) in the next columns the logits (B, Q, V), or the last `to_keep`."""
        self._wear(weights)
        past = cache.get_seq_length()
        columns = torch.arange(past + tokens.shape[1], device=tokens.device)
        positions, mask = columns[past:].expand(tokens.shape), None
        if start is not None:
            mask = (columns >= start.unsqueeze(-1)).long()  # (B, L)
            positions = (positions - start.unsqueeze(-1)).clamp(min=0)  # (B, Q)
        return self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=to_keep,
        ).logits


class LlamaForward:
    """The fast pass, for models that it fits."""

    groups = True

    def __init__(
        self,
        llama: Llama,
        fold: Callable[[dict[str, Tensor] | None], Weights],
        reorders: bool = True,
    ) -> None:
        self.llama = llama
        self.reorders = reorders  # weights that are much used; the numbers are rounded otherwise
        self.device = llama.model.device
        self._columns = torch.arange(0, device=self.device)
        self.prepare = fold

    def nbytes(self, weights: Weights) -> int:
        return weights.nbytes

    def prefill(
        self, weights: Weights, prompts: list[np.ndarray], cache: Cache, every: bool = False
    ) -> tuple[Tensor, list[OnDemand]]:
        """Packed, as rows are in training: no padding, and beginnings that some share once."""
        packed = pack(prompts, self.device)
        attention = Attention(packed, self.llama.heads, self.llama.kv_heads, self.llama.dim)
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = lengths.cumsum() - 1
        columns = np.maximum(np.arange(lengths.max()) - lengths.max() + 1, 1 - lengths[:, None])
        # Which packed token stands in each column, (B L,); in padding a row's own first one.
        places = packed.source[torch.from_numpy((ends[:, None] + columns).ravel()).to(self.device)]
        last = packed.source[torch.from_numpy(ends).to(self.device)]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            states = qkv[:, self.llama.heads :].index_select(0, places)  # (B L, 2 kv_heads, D)
            states = states.unflatten(0, (len(prompts), -1)).transpose(1, 2)
            cache.update(*states.chunk(2, dim=1), layer)
            return attention(qkv)

        if self.reorders:
            weights.expect(len(packed.tokens))
        hidden, _ = self.llama.hidden(
            weights, packed.tokens, packed.positions, attend, wanted=None if every else last
        )
        logits = weights.head(hidden)
        if not every:
            return logits, []
        rows = packed.source.split(lengths.tolist())
        return logits.index_select(0, last), [partial(logits.index_select, 0, row) for row in rows]

    def first(self, count: int) -> Tensor:
        """0, 1, 2 ... as many; made rarely, since they are asked for at every token."""
        if len(self._columns) < count:
            self._columns = torch.arange(2 * count, device=self.device)
        return self._columns[:count]

    def next(
        self,
        weights: Weights,
        tokens: Tensor,
        start: Tensor | None,
        cache: Cache | GroupedCache,
    ) -> Tensor:
        if self.reorders:
            weights.expect(len(tokens))
        past = cache.get_seq_length()
        positions = self.first(past + 1)[past].expand(len(tokens))
        if start is not None:
            positions = positions - start
        grouped = isinstance(cache, GroupedCache)
        attend = self._in_groups(cache, start) if grouped else self._row_by_row(cache, start)
        return weights.head(self.llama.hidden(weights, tokens, positions, attend)[0])

    def _row_by_row(self, cache: Cache, start: Tensor | None) -> Callable[[int, Tensor], Tensor]:
        """Attention (see `Llama.hidden`) of each row's newest token to all columns of its row."""
        past = cache.get_seq_length()
        for layer in cache.layers:
            layer.reserve(layer.rows, past + 1)
        columns = self.first(cache.layers[0].width)
        hidden = columns > past  # not in use yet, (L,); or left of a row's start, (B, L)
        if start is not None:
            hidden = (hidden | (columns < start.unsqueeze(-1))).repeat_interleave(
                self.llama.kv_heads, 0
            )
        mask = torch.where(hidden, MASKED, 0.0).view(-1, 1, len(columns))

        def attention(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = self.llama.apart(qkv.unsqueeze(2))  # (B, heads, 1, D)
            keys, values = (each.flatten(0, 1) for each in cache.layers[layer].write(k, v))
            q = q.reshape(len(keys), -1, self.llama.dim)  # (B kv_heads, h, D)
            mixed = torch.empty_like(q)
            attend(q, keys, values, (), (mask, None), self.llama.dim**-0.5, mixed)
            return mixed.view(len(qkv), -1)

        return attention

    def _in_groups(
        self, cache: GroupedCache, start: Tensor | None
    ) -> Callable[[int, Tensor], Tensor]:
        """The same where the rows of a group share the columns of their prompt."""
        for layer in cache.layers:
            layer.reserve()
        first = cache.layers[0]
        groups, rows, kv_heads, dim = first.shape
        columns = self.first(max(first.width, first.before))
        own = torch.where(columns[: first.width] > first.length, MASKED, 0.0).view(1, 1, -1)
        lent = own.new_zeros(1, 1, 1)
        if start is not None:
            padding = columns[: first.before] < start.view(groups, rows)[:, :1]  # (G, P)
            lent = torch.where(padding, MASKED, 0.0).repeat_interleave(kv_heads, 0).unsqueeze(1)

        def attention(index: int, qkv: Tensor) -> Tensor:
            layer = cache.layers[index]
            q, k, v = self.llama.apart(qkv)  # (G R, heads, D)
            layer.write(k, v)
            q = q.reshape(groups, rows, kv_heads, -1, dim).transpose(1, 2).contiguous()
            asked = q.view(groups * kv_heads * rows, -1, dim)  # (G kv_heads R, h, D)
            mixed = torch.empty_like(asked)
            keys, values = (each.flatten(0, 2) for each in layer.own)
            prompts = [each.flatten(0, 1) for each in layer.prompts]
            attend(asked, keys, values, prompts, (own, lent), dim**-0.5, mixed)
            return mixed.view(q.shape).transpose(1, 2).reshape(len(qkv), -1)

        return attention


def ending_together(prompts: list[np.ndarray]) -> np.ndarray:
    """Which columns (B, L) hold tokens where all prompts end in the last one."""
    lengths = np.array([[len(prompt)] for prompt in prompts])
    return np.arange(lengths.max()) >= lengths.max() - lengths
