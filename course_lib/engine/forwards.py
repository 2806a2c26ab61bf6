"""Which forward pass gives the next logits? Two, with the same results, behind one method.

`GeneralForward` runs any Hugging Face causal LM; `LlamaForward` the faster pass of `llama`. Both
compute with weights that an adapter has been folded into, and write to the same key-value cache.

Legend: B rows, Q new columns, L columns in all, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from course_lib.engine.attention import SHORT, attend
from course_lib.engine.cache import GroupedCache
from course_lib.engine.llama import Llama, Weights
from course_lib.engine.lora import Folding, sharing_copy

MASKED = -1e30  # not minus infinity: a padded column sees nothing, and its softmax must stay finite


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

    def __call__(
        self, weights: Any, tokens: Tensor, start: Tensor | None, cache: Cache, every: bool = False
    ) -> Tensor:
        """Logits after the last column (B, V), or after every one (B, Q, V), of tokens (B, Q).

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

    def __call__(
        self,
        weights: dict[str, Tensor],
        tokens: Tensor,
        start: Tensor | None,
        cache: Cache,
        every: bool = False,
    ) -> Tensor:
        self._wear(weights)
        past = cache.get_seq_length()
        columns = torch.arange(past + tokens.shape[1], device=tokens.device)
        positions, mask = columns[past:].expand(tokens.shape), None
        if start is not None:
            mask = (columns >= start.unsqueeze(-1)).long()  # (B, L)
            positions = (positions - start.unsqueeze(-1)).clamp(min=0)  # (B, Q)
        logits = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if every else 1,
        ).logits
        return logits if every else logits[:, -1]


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

    def __call__(
        self,
        weights: Weights,
        tokens: Tensor,
        start: Tensor | None,
        cache: Cache,
        every: bool = False,
    ) -> Tensor:
        rows, new = tokens.shape
        if new == 1 and cache.layers:
            return weights.head(self.next(weights, tokens.squeeze(1), start, cache))
        past = cache.get_seq_length()
        columns = self.first(past + new)
        positions = columns[past:].expand(rows, new)
        real = None  # the tokens that are no padding, where only these are computed
        if start is not None:
            if not every:
                real = (positions >= start.unsqueeze(-1)).flatten().nonzero().squeeze(-1)
            positions = (positions - start.unsqueeze(-1)).clamp(min=0)
        mask = visible(columns, past, start)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            if real is not None:
                padded = qkv.new_zeros(rows * new, *qkv.shape[1:])
                qkv = padded.index_copy_(0, real, qkv)
            qkv = qkv.unflatten(0, (rows, new)).transpose(1, 2)  # (B, n, Q, D)
            q, k, v = self.llama.apart(qkv)
            keys, values = cache.update(k, v, layer)  # (B, kv_heads, L, D)
            mixed = attention(q, keys, values, mask).transpose(1, 2).reshape(rows * new, -1)
            return mixed if real is None else mixed.index_select(0, real)

        chosen, at = tokens.flatten(), positions.flatten()
        if real is not None:
            chosen, at = chosen.index_select(0, real), at.index_select(0, real)
        if self.reorders:
            weights.expect(len(chosen))
        ends = None if every else last_tokens(rows, new, start, tokens.device)
        hidden, _ = self.llama.hidden(weights, chosen, at, attend, wanted=ends)  # (T or B, H)
        return weights.head(hidden.unflatten(0, (rows, new)) if every else hidden)

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
        """The hidden states (B, H) of one token more for each row (B,)."""
        if self.reorders:
            weights.expect(len(tokens))
        past = cache.get_seq_length()
        positions = self.first(past + 1)[past].expand(len(tokens))
        if start is not None:
            positions = positions - start
        grouped = isinstance(cache, GroupedCache)
        attend = self._in_groups(cache, start) if grouped else self._row_by_row(cache, start)
        return self.llama.hidden(weights, tokens, positions, attend)[0]

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


def last_tokens(rows: int, new: int, start: Tensor | None, device: torch.device) -> Tensor:
    """Where each row's last token stands among the real ones, row after row (B,)."""
    lengths = torch.full((rows,), new, device=device) if start is None else new - start
    return lengths.cumsum(0) - 1


def visible(columns: Tensor, past: int, start: Tensor | None) -> Tensor | None:
    """The attention mask (B or 1, 1, Q, L): 0 where a column may be seen; None when all may."""
    new = columns[past:].unsqueeze(-1)  # (Q, 1)
    mask = None
    if len(new) > 1:
        mask = (columns > new).float().mul_(MASKED)[None, None]
    if start is not None:
        padding = (columns < start.unsqueeze(-1)).float().mul_(MASKED)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """What the queries (B, heads, Q, D) find among keys and values (B, kv_heads, L, D).

    For one query, and where rows are short, plain products are faster than torch's own function.
    """
    (rows, kv_heads, columns, dim), heads = keys.shape, q.shape[1]
    if q.shape[2] > 1 and columns > SHORT:
        gqa = heads != kv_heads
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=gqa)
    queries = (q * dim**-0.5).reshape(rows * kv_heads, -1, dim)  # (B kv_heads, heads/kv_heads Q, D)
    scores = queries @ keys.flatten(0, 1).transpose(1, 2)
    if mask is not None:
        scores.view(rows, heads, -1, columns).add_(mask)
    return (scores.softmax(-1) @ values.flatten(0, 1)).view(q.shape)
