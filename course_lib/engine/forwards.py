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

from course_lib.engine.llama import Llama, Weights
from course_lib.engine.lora import Folding, sharing_copy

MASKED = -1e30  # not minus infinity: a padded column sees nothing, and its softmax must stay finite


class Forward(Protocol):
    """What decoding needs from a model."""

    device: torch.device

    def prepare(self, state: dict[str, Tensor] | None) -> Any:
        """Weights with an adapter's tensors folded in; None for the bare base model."""
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

    def __init__(self, model: PreTrainedModel, folding: Folding) -> None:
        self.model = sharing_copy(model)  # `folding` needs the original weights
        self.device = model.device
        self.folding = folding
        self._worn: dict[str, Tensor] = {}
        self._original: dict[str, Tensor | None] = {}

    def prepare(self, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return {} if state is None else self.folding.fold(state)

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

    def __init__(self, llama: Llama, fold: Callable[[dict[str, Tensor] | None], Weights]) -> None:
        self.llama = llama
        self.device = llama.model.device
        self.prepare = fold

    def __call__(
        self,
        weights: Weights,
        tokens: Tensor,
        start: Tensor | None,
        cache: Cache,
        every: bool = False,
    ) -> Tensor:
        rows, new = tokens.shape
        past = cache.get_seq_length()
        columns = torch.arange(past + new, device=tokens.device)
        positions = columns[past:].expand(rows, new)
        if start is not None:
            positions = (positions - start.unsqueeze(-1)).clamp(min=0)
        mask = visible(columns, past, start)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = self.llama.apart(qkv)
            k, v = (part.unflatten(0, (rows, new)).transpose(1, 2) for part in (k, v))
            keys, values = cache.update(k, v, layer)  # (B, kv_heads, L, D)
            if new == 1:
                return one_query(q, keys, values, mask)
            mixed = F.scaled_dot_product_attention(
                q.unflatten(0, (rows, new)).transpose(1, 2),
                keys,
                values,
                attn_mask=mask,
                enable_gqa=q.shape[1] != keys.shape[1],
            )
            return mixed.transpose(1, 2).reshape(rows * new, -1)

        hidden, _ = self.llama.hidden(weights, tokens.flatten(), positions.flatten(), attend)
        hidden = hidden.unflatten(0, (rows, new))
        return weights.head(hidden if every else hidden[:, -1])


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


def one_query(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one new token per row, q (B, heads, D) -> (B, H): plain products are fastest."""
    grouped = q.unflatten(1, (keys.shape[1], -1))  # (B, kv_heads, heads / kv_heads, D)
    scores = (grouped * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)  # (..., L)
    if mask is not None:
        scores += mask
    return (scores.softmax(-1) @ values).flatten(1)
