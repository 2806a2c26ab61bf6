"""How do rows of different length share one matrix product? Packed one after the other, no padding.

Rows that begin alike, as the samples of one prompt do, share that beginning: it is computed once,
and each row attends to it. Attention is the only place where rows are looked at one by one;
there, rows of similar length are put side by side, padded, in a few buckets.

Legend: T packed tokens; M = all tokens of all rows, counted once for each row. A bucket has G
groups of R rows, the longest of C tokens of its own and P of a shared beginning: L = P + C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORTH = 0.1  # a beginning is shared where that saves this part of the group's tokens
COUNTS = (1, 2, 3)  # how many buckets there may be
A_BUCKET = 8000  # so many pairs of query and key are attended to in the time that a bucket costs


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
    """Segments that attend side by side, group by group: packed tokens, 0 where padded."""

    queries: np.ndarray  # (G, R, C): the tokens that ask, and are asked by those behind them
    real: np.ndarray  # (G, R, C): which of them are no padding
    lent: np.ndarray  # (G, P): the beginning that the rows of a group share
    borrowed: np.ndarray  # (G, P): which of its tokens are no padding

    @property
    def keys(self) -> int:
        """How many tokens a row may see (L)."""
        return self.lent.shape[1] + self.queries.shape[2]


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
    alone = [segment for segment in segments if segment.before is None]
    continuing = [segment for segment in segments if segment.before is not None]
    buckets = []
    for chosen, orders in ((alone, [by_length]), (continuing, [by_length, by_group(continuing)])):
        cuts = [shares(sorted(chosen, key=order), n) for order in orders for n in COUNTS]
        buckets += min(cuts, key=lambda cut: sum(map(cost, cut)))
    return buckets


def by_length(segment: Segment) -> tuple[int, int]:
    return len(segment.tokens), segment.offset


def by_group(segments: list[Segment]) -> Callable[[Segment], tuple[int, int]]:
    """The order in which groups stay together: by the longest of each."""
    longest: dict[int, int] = {}
    for segment in segments:
        group = beginning(segment)
        longest[group] = max(longest.get(group, 0), len(segment.tokens))
    return lambda segment: (longest[beginning(segment)], beginning(segment))


def beginning(segment: Segment) -> int:
    """Where the beginning stands that a segment continues: the same for a whole group."""
    return segment.first if segment.before is None else segment.before.first


def shares(segments: list[Segment], n: int) -> list[list[Segment]]:
    share = max(1, -(-len(segments) // n))
    return [segments[i : i + share] for i in range(0, len(segments), share)]


def grouped(segments: list[Segment]) -> list[list[Segment]]:
    groups: dict[int, list[Segment]] = {}
    for segment in segments:
        groups.setdefault(beginning(segment), []).append(segment)
    return list(groups.values())


def cost(bucket: list[Segment]) -> int:
    """What attention over a bucket takes, in pairs of query and key: G R C L of its own."""
    groups = grouped(bucket)
    own = max(len(segment.tokens) for segment in bucket)
    rows = len(groups) * max(map(len, groups))
    return A_BUCKET + rows * own * (own + max(segment.offset for segment in bucket))


def side_by_side(segments: list[Segment]) -> Bucket:
    """The segments of a bucket, each in a row of its own among those of its group."""
    groups = grouped(segments)
    lengths, firsts = np.zeros((2, len(groups), max(map(len, groups)), 1), dtype=np.int64)
    for group, members in enumerate(groups):
        for row, segment in enumerate(members):
            lengths[group, row], firsts[group, row] = len(segment.tokens), segment.first
    offsets = np.array([[members[0].offset] for members in groups])
    lenders = np.array([[beginning(members[0])] for members in groups])
    columns, before = np.arange(lengths.max()), np.arange(offsets.max())
    real, borrowed = columns < lengths, before < offsets
    queries = np.where(real, firsts + columns, 0)
    return Bucket(queries, real, np.where(borrowed, lenders + before, 0), borrowed)
