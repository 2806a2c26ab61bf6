"""How do rows of different length share one matrix product? Packed one after the other, no padding.

Rows that begin alike, as the samples of one prompt do, share that beginning: it is computed once,
and each row attends to it. Attention is the only place where rows are looked at one by one;
there, rows of similar length are put side by side, padded, in a few buckets.

Legend: T packed tokens; M = all tokens of all rows, counted once for each row. A bucket has G
groups of R rows, the longest of C tokens of its own and P of a shared beginning: L = P + C.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

WORTH = 0.15  # beginnings are shared where that saves this part of a group's tokens, and of all
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
    """Group rows that begin alike: (length of the shared beginning, the rows' indices).

    Sorted, rows with a common beginning stand together, and the longer it is, the fewer they are:
    intervals within intervals (those of a suffix array's LCP array: Abouelhoda, Kurtz and Ohlebusch
    2004), which become groups from the inside out. Rows that no group takes are one group with a
    beginning of length 0.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].tobytes())
    commons = common_beginnings([rows[index] for index in order])
    open_ones = [Interval(0)]
    for index, common in zip(order, [*commons, 0], strict=True):  # with the next one
        closed = Interval(common, [index])
        while open_ones[-1].length > common:
            closed = open_ones.pop().add(closed).grouped(rows)
        if open_ones[-1].length < common:
            open_ones.append(Interval(common))
        open_ones[-1].add(closed)
    (whole,) = open_ones
    if sum(map(saved, whole.groups)) < WORTH * sum(map(len, rows)):
        return [(0, list(range(len(rows))))]
    return [*whole.groups, (0, whole.alone)] if whole.alone else whole.groups


@dataclass
class Interval:
    """Neighbours among the sorted rows, with a common beginning of `length` tokens."""

    length: int
    alone: list[int] = field(default_factory=list)  # rows that no group has taken
    groups: list[tuple[int, list[int]]] = field(default_factory=list)

    def add(self, inner: Interval) -> Interval:
        self.alone += inner.alone
        self.groups += inner.groups
        return self

    def grouped(self, rows: list[np.ndarray]) -> Interval:
        """Make one group of its rows, but for the groups in it that save more by themselves."""
        kept = [group for group in self.groups if self.length * len(group[1]) < saved(group)]
        joins = [group for group in self.groups if self.length * len(group[1]) >= saved(group)]
        members = [*self.alone, *chain.from_iterable(members for _, members in joins)]
        worth = max(sum(map(saved, joins)), WORTH * sum(len(rows[index]) for index in members))
        if members and saved((self.length, members)) >= worth:
            self.alone, self.groups = [], [*kept, (self.length, members)]
        return self


def saved(group: tuple[int, list[int]]) -> int:
    """How many tokens need not be computed where a group shares its beginning."""
    length, members = group
    return length * (len(members) - 1)


def common_beginnings(rows: list[np.ndarray]) -> list[int]:
    """How many tokens each row shares with the one before it at the start, leaving either at least
    one of its own; nothing for the first row.

    Pairs are laid end to end, not one below the other: a long row pads no short ones.
    """
    lengths = np.array([len(row) for row in rows])
    most = np.minimum(lengths[1:], lengths[:-1]) - 1  # tokens of each pair that are compared
    if not most.any():
        return most.tolist()
    ends = most.cumsum()
    starts = ends - most
    tokens = np.concatenate(rows)
    first = lengths[:-1].cumsum() - lengths[:-1]  # of a pair's first row
    places = np.arange(ends[-1]) + np.repeat(first - starts, most)
    differ = np.flatnonzero(tokens[places] != tokens[places + np.repeat(lengths[:-1], most)])
    differ = np.append(differ, ends[-1])
    return np.minimum(differ[differ.searchsorted(starts)] - starts, most).tolist()


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
    for chosen, orders in ((alone, [by_length]), (continuing, [by_length, by_group])):
        if chosen:
            facts = np.array([(len(one.tokens), one.offset, beginning(one)) for one in chosen])
            cuts = [cut for order in orders for cut in ways_to_cut(*order(*facts.T))]
            cheapest = min(cuts, key=lambda cut: sum(cost(*facts[share].T) for share in cut))
            buckets += [[chosen[index] for index in share] for share in cheapest]
    return buckets


def by_length(
    lengths: np.ndarray, offsets: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An order of the segments, and the lengths that rise in it."""
    order = np.lexsort((offsets, lengths))
    return order, lengths[order]


def by_group(
    lengths: np.ndarray, offsets: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same with groups that stay together: by the longest of each."""
    _, which = np.unique(groups, return_inverse=True)
    longest = np.zeros_like(groups)
    np.maximum.at(longest, which, lengths)
    order = np.lexsort((groups, longest[which]))
    return order, longest[which][order]


def ways_to_cut(order: np.ndarray, rising: np.ndarray) -> list[list[np.ndarray]]:
    """A few equal shares, or a cut wherever a length reaches the next power of two: whatever the
    lengths are, at most half of each row is padding then."""
    doubled = np.flatnonzero(np.diff(np.frexp(rising)[1])) + 1
    return [*(shares(order, n) for n in COUNTS), np.split(order, doubled)]


def beginning(segment: Segment) -> int:
    """Where the beginning stands that a segment continues: the same for a whole group."""
    return segment.first if segment.before is None else segment.before.first


def shares(order: np.ndarray, n: int) -> list[np.ndarray]:
    share = -(-len(order) // n)
    return [order[i : i + share] for i in range(0, len(order), share)]


def cost(lengths: np.ndarray, offsets: np.ndarray, groups: np.ndarray) -> int:
    """What attention over a bucket takes, in pairs of query and key: G R C L of its own."""
    _, sizes = np.unique(groups, return_counts=True)
    own, most = lengths.max(), most_side_by_side(sizes)
    return A_BUCKET + rows_for(sizes, most) * own * (own + offsets.max())


def most_side_by_side(sizes: np.ndarray) -> int:
    """How many rows (R) to give groups of so many segments: as many as the largest has, or as all
    have on average, and larger ones are cut, where that needs fewer rows. At most half of them are
    padding."""
    largest, average = int(sizes.max()), -(-int(sizes.sum()) // len(sizes))
    return average if rows_for(sizes, average) < rows_for(sizes, largest) else largest


def rows_for(sizes: np.ndarray, most: int) -> int:
    """The rows (G R) that groups of so many segments need, cut into parts of at most so many."""
    return int((-(-sizes // most)).sum()) * most


def grouped(segments: list[Segment]) -> list[list[Segment]]:
    """The segments of each group, the larger groups in parts."""
    groups: dict[int, list[Segment]] = {}
    for segment in segments:
        groups.setdefault(beginning(segment), []).append(segment)
    most = most_side_by_side(np.array([len(members) for members in groups.values()]))
    return [
        members[first : first + most]
        for members in groups.values()
        for first in range(0, len(members), most)
    ]


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
