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
from torch import Tensor

WORTH = 0.1  # a beginning is shared where that saves this part of the group's tokens
BUCKETS = 3  # at most, by length
A_BUCKET = 2000  # so many pairs of query and key are attended to in the time that a bucket costs


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


@dataclass
class Bucket:
    """Segments that attend side by side: packed tokens, 0 where padded."""

    queries: np.ndarray  # (S, C): the tokens that ask
    keys: np.ndarray  # (S, L): those that they may see, P of a beginning and C of their own
    real: np.ndarray  # (S, C): which queries are no padding
    borrowed: np.ndarray  # (S, P): which keys belong to a shared beginning

    @property
    def rows(self) -> int:
        return len(self.queries)


@dataclass
class Packed:
    """Some rows, packed."""

    tokens: Tensor  # (T,)
    positions: Tensor  # (T,)
    source: Tensor  # (M,): the packed token that stands at each position of each row
    buckets: list[Bucket]


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
    whole = [part for row in range(len(rows)) for part in (own[row].before, own[row]) if part]
    layout = (
        np.concatenate([segment.tokens for segment in segments]),
        counted([segment.offset for segment in segments], segments),
        counted([segment.first for segment in whole], whole),
    )
    tokens, positions, source = (torch.from_numpy(each).to(device) for each in layout)
    buckets = [side_by_side(bucket) for bucket in bucketed(segments)]
    return Packed(tokens, positions, source, buckets)


def counted(starts: list[int], segments: list[Segment]) -> np.ndarray:
    """From each start on, a number for each token of its segment, end to end."""
    lengths = np.array([len(segment.tokens) for segment in segments])
    ends = lengths.cumsum()
    return np.arange(ends[-1]) + np.repeat(np.array(starts) - (ends - lengths), lengths)


def bucketed(segments: list[Segment]) -> list[list[Segment]]:
    """Segments of similar length together; those that continue another one apart from the rest."""
    buckets = []
    for continuing in (False, True):
        chosen = [segment for segment in segments if (segment.before is not None) == continuing]
        chosen.sort(key=lambda segment: (len(segment.tokens), segment.offset))
        buckets += min((shares(chosen, n) for n in range(1, BUCKETS + 1)), key=cost)
    return buckets


def shares(segments: list[Segment], n: int) -> list[list[Segment]]:
    share = max(1, -(-len(segments) // n))
    return [segments[i : i + share] for i in range(0, len(segments), share)]


def cost(buckets: list[list[Segment]]) -> int:
    """What attention over these buckets takes, in pairs of query and key: S C L of each."""
    total = A_BUCKET * len(buckets)
    for bucket in buckets:
        own = max(len(segment.tokens) for segment in bucket)
        total += len(bucket) * own * (own + max(segment.offset for segment in bucket))
    return total


def side_by_side(segments: list[Segment]) -> Bucket:
    """The segments of a bucket, each in a row of its own."""
    lengths = np.array([[len(segment.tokens)] for segment in segments])
    offsets = np.array([[segment.offset] for segment in segments])
    firsts = np.array([[segment.first] for segment in segments])
    lenders = np.array([[segment.before.first if segment.before else 0] for segment in segments])
    columns, back = np.arange(lengths.max()), np.arange(-offsets.max(), 0)
    real, borrowed = columns < lengths, back >= -offsets
    queries = np.where(real, firsts + columns, 0)
    lent = np.where(borrowed, lenders + offsets + back, 0)
    return Bucket(queries, np.concatenate([lent, queries], axis=1), real, borrowed)
