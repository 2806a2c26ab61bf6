"""What is remembered of the tokens so far: keys and values of all rows, one slab for each layer.

Rows that have begun together, as many from each prompt, keep a prompt's keys and values once for
all of its rows (`GroupedCache`), until rows come or go: attention then reads a fraction of the
memory. All others have a slab (`SlabLayer`) to themselves.

All rows share one clock: column t of the slab is written by every row in the same step, so a row
that came later starts at a later column (`start`), and everything left of it is masked. Rows that
have ended are overwritten by the last ones. It is a `transformers` cache, so any causal LM can
write to it.

A slab has few columns that are not in use yet, and is copied to a wider one when they are. Room for
all tokens to come would save these copies, and cost more: attention then jumps from row to row over
memory that it does not read, the processor fetches nothing ahead, and takes twice as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SPARE = 8  # columns that may be unused, or one in sixteen where that is more
FIRST = 16  # columns that rows with a shared prompt begin with; products with 12 or fewer are slow
SHARED_AT = 200_000  # numbers of a layer's keys that need no copy, from which on it pays


class SlabLayer(CacheLayerMixin):
    """Keys and values of one layer: buffers (rows, heads, columns, dim), in use up to a corner.

    What is not in use of a live row holds zeros: who attends to all columns masks these, and a NaN
    would survive the mask.
    """

    is_sliding = False  # windows are cut by the attention mask

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.length = 0

    @property
    def width(self) -> int:
        """The columns there are, in use or not."""
        return self.keys.shape[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_empty(0, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Write the new columns (B, heads, Q, dim) of all rows; return everything up to them."""
        keys, values = self.write(key_states, value_states)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The same, but return all columns, (B, heads, `width`, dim), which lie close together."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, end = key_states.shape[0], self.length + key_states.shape[2]
        self.reserve(rows, end)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[:rows, :, self.length : end] = states
            if rows > self.rows:
                buffer[self.rows : rows, :, end:] = 0
        self.rows, self.length = rows, end
        return self.keys[:rows], self.values[:rows]

    def reserve(self, rows: int, columns: int, shift: int = 0) -> None:
        """Make room, and move what is there `shift` columns to the right."""
        had_rows, heads, had_columns, _ = self.keys.shape
        if not shift and rows <= had_rows and columns <= had_columns:
            return
        rows = had_rows if rows <= had_rows else max(rows, 2 * self.rows)
        if columns > had_columns:
            columns += spare(columns)
        columns = max(columns, had_columns)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(rows, heads, columns, old.shape[3])
            new[: self.rows, :, :shift] = 0
            new[: self.rows, :, shift : shift + self.length] = old[: self.rows, :, : self.length]
            new[: self.rows, :, shift + self.length :] = 0
            setattr(self, name, new)
        self.length += shift

    def admit(self, other: SlabLayer, index: Tensor) -> None:
        """Append rows `index` of another slab, ending at this slab's last column."""
        if not self.rows:  # nothing to be next to
            self.keys = other.keys.index_select(0, index)
            self.values = other.values.index_select(0, index)
            self.rows, self.length, self.is_initialized = len(index), other.length, True
            return
        rows, length = self.rows + len(index), max(self.length, other.length)
        self.reserve(rows, length, shift=length - self.length)
        first = length - other.length
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[self.rows : rows, :, :first] = 0
            mine[self.rows : rows, :, first:length] = theirs.index_select(0, index)[
                :, :, : other.length
            ]
            mine[self.rows : rows, :, length:] = 0
        self.rows, self.length = rows, length

    def keep(self, holes: Tensor, tails: Tensor, rows: int) -> None:
        """Overwrite ended rows, `holes`, with live ones, `tails`; forget all from `rows` on."""
        if len(holes):
            for buffer in (self.keys, self.values):
                buffer[holes] = buffer[tails]
        self.rows = rows

    def trim(self, columns: int) -> None:
        """Forget the first columns, which no live row looks at any more."""
        for name in ("keys", "values"):
            kept = getattr(self, name)[: self.rows, :, columns:]
            setattr(self, name, kept.contiguous())
        self.length -= columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def spare(columns: int) -> int:
    """How many columns to make room for beyond these."""
    return max(SPARE, columns // 16)


def new_cache() -> Cache:
    """An empty cache, which grows a `SlabLayer` for each layer that writes to it."""
    return Cache(layer_class_to_replicate=SlabLayer)


class GroupedLayer:
    """One layer of a `GroupedCache`: G prompts of P columns, and R rows to each.

    The prompts' keys and values are (G, kv_heads, P, D); what the rows have added, up to a corner
    and zeros behind it, is (G, kv_heads, R, columns, D).
    """

    def __init__(self, prompts: SlabLayer, rows: int) -> None:
        self.prompts = tuple(
            each[: prompts.rows, :, : prompts.length] for each in (prompts.keys, prompts.values)
        )
        groups, heads, self.before, dim = self.prompts[0].shape
        self.shape = groups, rows, heads, dim
        self.keys = self.prompts[0].new_zeros(groups, heads, rows, FIRST, dim)
        self.values = self.keys.clone()
        self.length = 0

    @property
    def width(self) -> int:
        """The own columns there are, in use or not."""
        return self.keys.shape[3]

    def reserve(self) -> None:
        """Make room for one column more."""
        if self.length == self.width:
            more = spare(self.before + self.length)
            self.keys, self.values = (F.pad(each, (0, 0, 0, more)) for each in self.own)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Add what every row has of its newest token, (G R, kv_heads, D)."""
        for buffer, states in zip(self.own, (keys, values), strict=True):
            buffer[:, :, :, self.length] = states.reshape(self.shape).transpose(1, 2)
        self.length += 1

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def apart(self, rows: Tensor) -> SlabLayer:
        """The rows of these numbers (B,), a copy of its prompt for each."""
        layer, group, place = SlabLayer(), rows // self.shape[1], rows % self.shape[1]
        whole = []
        for prompts, own in zip(self.prompts, self.own, strict=True):
            added = own[group, :, place, : self.length]  # (B, kv_heads, columns, D)
            whole.append(torch.cat([prompts[group], added], dim=-2))
        layer.write(*whole)
        return layer


class GroupedCache:
    """The cache of so many rows, equally many of each prompt, one after the other."""

    def __init__(self, prompts: Cache, rows: int) -> None:
        self.layers = [GroupedLayer(layer, rows // layer.rows) for layer in prompts.layers]

    def get_seq_length(self) -> int:
        return self.layers[0].before + self.layers[0].length

    def apart(self, rows: Tensor) -> Cache:
        """A cache of these of its rows (B,), in which each may come and go."""
        cache = new_cache()
        cache.layers = [layer.apart(rows) for layer in self.layers]
        return cache

    @staticmethod
    def pays(prompts: Cache, source: list[int]) -> bool:
        """Have rows with these prompts come in equal groups, and so that sharing saves enough?"""
        layer = prompts.layers[0]
        rows, rest = divmod(len(source), layer.rows)
        in_groups = not rest and source == [place // rows for place in range(len(source))]
        saved = (rows - 1) * layer.keys[: layer.rows, :, : layer.length].numel()
        return in_groups and saved >= SHARED_AT
