"""How do rows of different length share one matrix product? Packed one after the other, no padding.

Rows that begin alike, as the samples of one prompt do, share that beginning: it is computed once,
and each row attends to it. Attention is the only place where rows are looked at one by one;
there, rows of similar length are put side by side, padded, in a few buckets.

Legend: T packed tokens, S rows of a bucket, C its longest own part, L = P + C with P the longest
shared beginning; M = all tokens of all rows, counted once for each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORTH = 0.1  # a beginning is shared where that saves this part of the group's tokens
BUCKETS = 4  # by length


@dataclass
class Segment:
    """A run of new tokens: rows' own parts, or a beginning that some rows share."""

    tokens: np.ndarray
    first: int  # its first place among the packed tokens
    before: Segment | None = None  # the beginning it continues

    @property
    def offset(self) -> int:
        """The position of its first token in its row."""
        return 0 if self.before is None else len(self.before.tokens)

    @property
    def places(self) -> np.ndarray:
        return np.arange(self.first, self.first + len(self.tokens))


@dataclass
class Bucket:
    """Segments that attend side by side."""

    rows: int  # S
    own: int  # C
    seen: int  # L
    mask: Tensor | None  # (S, 1, C, L): 0 or -inf; None where plain causal attention is enough


@dataclass
class Packed:
    """Some rows, packed; Q and E are the sums of S C and S L over the buckets."""

    tokens: Tensor  # (T,)
    positions: Tensor  # (T,)
    source: Tensor  # (M,): the packed token that stands at each position of each row
    buckets: list[Bucket]
    queries: Tensor  # (Q,): the tokens that ask, bucket by bucket, token 0 where padded
    keys: Tensor  # (E,): the tokens that they may see, token 0 where padded
    answers: Tensor  # (T,): where among the Q each token's answer stands


def shared_prefixes(rows: list[np.ndarray]) -> list[tuple[int, list[int]]]:
    """Group rows that begin alike: (length of the shared beginning, the rows' indices)."""
    ordered = sorted(range(len(rows)), key=lambda index: rows[index].tobytes())
    groups: list[tuple[int, list[int]]] = []
    for index in ordered:
        if groups:
            length, members = groups[-1]
            common = min(length, common_prefix(rows[members[-1]], rows[index]))
            if common * len(members) >= max(1, length * (len(members) - 1)):
                groups[-1] = (common, [*members, index])
                continue
        groups.append((len(rows[index]) - 1, [index]))
    return [(length if worth(length, rows, members) else 0, members) for length, members in groups]


def worth(length: int, rows: list[np.ndarray], members: list[int]) -> bool:
    saved = length * (len(members) - 1)
    return saved > WORTH * sum(len(rows[member]) for member in members)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows share at the start, leaving each at least one of its own."""
    length = min(len(a), len(b)) - 1
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def pack(rows: list[np.ndarray], device: torch.device) -> Packed:
    """Lay out rows of tokens for one forward pass."""
    segments: list[Segment] = []
    own: dict[int, Segment] = {}
    size = 0
    for length, members in shared_prefixes(rows):
        before = None
        if length:
            before = Segment(rows[members[0]][:length], size)
            segments.append(before)
            size += length
        for member in members:
            own[member] = Segment(rows[member][length:], size, before)
            segments.append(own[member])
            size += len(own[member].tokens)
    source = []
    for index in range(len(rows)):
        if own[index].before is not None:
            source.append(own[index].before.places)
        source.append(own[index].places)
    layouts = [side_by_side(bucket) for bucket in bucketed(segments)]
    queries = np.concatenate([queries.ravel() for _, queries, _, _ in layouts])
    real = np.flatnonzero(np.concatenate([real.ravel() for _, _, _, real in layouts]))
    answers = np.empty(size, dtype=np.int64)
    answers[queries[real]] = real
    return Packed(
        put([segment.tokens for segment in segments], device),
        put([segment.offset + np.arange(len(segment.tokens)) for segment in segments], device),
        put(source, device),
        [bucket for bucket, _, _, _ in layouts],
        put([queries], device),
        put([keys.ravel() for _, _, keys, _ in layouts], device),
        put([answers], device),
    )


def put(parts: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)


def bucketed(segments: list[Segment]) -> list[list[Segment]]:
    """Segments of similar length together; those that continue another one apart from the rest."""
    buckets = []
    for continuing in (False, True):
        chosen = [segment for segment in segments if (segment.before is not None) == continuing]
        chosen.sort(key=lambda segment: (len(segment.tokens), segment.offset))
        share = max(1, -(-len(chosen) // BUCKETS))
        buckets += [chosen[i : i + share] for i in range(0, len(chosen), share)]
    return buckets


def side_by_side(segments: list[Segment]) -> tuple[Bucket, np.ndarray, np.ndarray, np.ndarray]:
    """A bucket with its queries (S, C), its keys (S, L), and which queries are real (S, C)."""
    own = max(len(segment.tokens) for segment in segments)
    before = max(segment.offset for segment in segments)
    queries = np.zeros((len(segments), own), dtype=np.int64)
    keys = np.zeros((len(segments), before + own), dtype=np.int64)
    hidden = np.triu(np.ones((own, before + own), dtype=bool), before + 1)  # the future
    hidden = np.repeat(hidden[None], len(segments), axis=0)
    for row, segment in enumerate(segments):
        length, offset = len(segment.tokens), segment.offset
        queries[row, :length] = segment.places
        keys[row, before : before + length] = segment.places
        if segment.before is not None:
            keys[row, before - offset : before] = segment.before.places
        hidden[row, :, : before - offset] = True
    mask = None
    if before:
        mask = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        mask = mask.unsqueeze(1)
    real = np.arange(own) < np.array([[len(segment.tokens)] for segment in segments])
    return Bucket(len(segments), own, before + own, mask), queries, keys, real


def attend(packed: Packed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of packed rows: q (T, heads, D), k and v (T, kv_heads, D) -> (T, H)."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    # An embedding look-up is torch's fastest gather: its gradient adds rows up without sorting.
    asked = F.embedding(packed.queries, q.flatten(1))
    seen = F.embedding(packed.keys, torch.cat([k.flatten(1), v.flatten(1)], dim=1))
    sizes = [(bucket.rows * bucket.own, bucket.rows * bucket.seen) for bucket in packed.buckets]
    answers = []
    for bucket, q_part, kv_part in zip(
        packed.buckets,
        asked.split([queries for queries, _ in sizes]),
        seen.split([keys for _, keys in sizes]),
        strict=True,
    ):
        queries = q_part.view(bucket.rows, bucket.own, heads, dim).transpose(1, 2)
        keys, values = (
            kv_part.view(bucket.rows, bucket.seen, 2, kv_heads, dim).permute(2, 0, 3, 1, 4).unbind()
        )
        answer = F.scaled_dot_product_attention(
            queries,  # (S, heads, C, D)
            keys,  # (S, kv_heads, L, D)
            values,
            attn_mask=bucket.mask,
            is_causal=bucket.mask is None,
            enable_gqa=heads != kv_heads,
        )
        answers.append(answer.transpose(1, 2).reshape(-1, heads * dim))
    return F.embedding(packed.answers, torch.cat(answers))
