"""How do packed rows attend? Bucket by bucket, forwards and backwards, without autograd.

Short rows take plain products and a softmax, whose probabilities are kept for the way back: on two
cores they need half to a third of the time of `scaled_dot_product_attention`, which shares its work
out badly where rows are short. And all rows of a group ask the beginning that they share in one
product, without a copy of its keys and values for each. Long rows take torch's function, which
keeps no probabilities.

Legend: T packed tokens, D dimensions of a head, n = heads + 2 kv_heads vectors a token has (its
queries, keys and values, in this order), h = heads / kv_heads; a bucket's G groups of R rows have
C tokens of their own after P shared ones, L = P + C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.engine.packing import Bucket, Packed

SHORT = 96  # keys of a row up to which its probabilities are written out


@dataclass(frozen=True)
class Heads:
    """A model's heads, and where each stands among the n vectors of a token."""

    count: int
    kv_count: int
    dim: int

    @property
    def vectors(self) -> int:
        return self.count + 2 * self.kv_count

    @property
    def queries(self) -> np.ndarray:
        return np.arange(self.count)

    @property
    def keys(self) -> np.ndarray:
        return self.count + np.arange(self.kv_count)

    @property
    def values(self) -> np.ndarray:
        return self.count + self.kv_count + np.arange(self.kv_count)

    @property
    def scale(self) -> float:
        return self.dim**-0.5


class Part(NamedTuple):
    """Some of the vectors that a bucket needs, in the order in which it takes them."""

    ids: np.ndarray  # of the T n vectors
    own: np.ndarray  # which stand in their own row here, not in padding
    borrowed: np.ndarray  # which are of a beginning, so that other rows have them as well


class Attention:
    """Attention over one layout; every layer uses the same.

    All vectors that a layer's buckets need are gathered at once, and their gradients on the way
    back, too: each vector stands once in its own row, those of a shared beginning also in others.
    """

    def __init__(self, packed: Packed, heads: int, kv_heads: int, dim: int) -> None:
        self.heads = Heads(heads, kv_heads, dim)
        device, vectors = packed.tokens.device, self.heads.vectors
        self.buckets = [
            (ShortRows if bucket.keys <= SHORT else LongRows)(bucket, self.heads, device)
            for bucket in packed.buckets
        ]
        parts = [part for bucket in self.buckets for part in bucket.parts]
        asking = [bucket.parts[0] for bucket in self.buckets]  # queries, and so their answers
        self.sizes = [part.ids.size for part in parts]
        self.asked = [part.ids.size for part in asking]
        ids, own, borrowed = (
            np.concatenate([array.ravel() for array in arrays])
            for arrays in zip(*parts, strict=True)
        )
        # Where each of the T n vectors stands in its own row, and each of the T heads answers.
        own_places = np.empty(len(packed.tokens) * vectors, dtype=np.int64)
        own_places[ids[own]] = np.flatnonzero(own)
        real = np.concatenate([part.own.ravel() for part in asking])
        token, head = np.divmod(
            np.concatenate([part.ids.ravel() for part in asking])[real], vectors
        )
        answers = np.empty(len(packed.tokens) * heads, dtype=np.int64)
        answers[token * heads + head] = np.flatnonzero(real)
        self.ids, self.own, self.answers, self.borrowed, self.lenders = (
            torch.from_numpy(each).to(device)
            for each in (ids, own_places, answers, np.flatnonzero(borrowed), ids[borrowed])
        )

    def __call__(self, qkv: Tensor, tape: list | None = None) -> Tensor:
        """qkv (T, n, D) -> the mixed values (T, heads D); the tape gets what `backward` needs."""
        dim = self.heads.dim
        vectors = iter(F.embedding(self.ids, qkv.view(-1, dim)).split(self.sizes))  # fastest gather
        answers = qkv.new_empty(sum(self.asked), dim)
        kept = []
        for bucket, into in zip(self.buckets, answers.split(self.asked), strict=True):
            parts = [next(vectors) for _ in bucket.parts]
            kept.append(bucket.forward(parts, into, training=tape is not None))
        if tape is not None:
            tape.append(kept)
        return F.embedding(self.answers, answers).view(len(qkv), -1)

    def backward(self, dy: Tensor, kept: list) -> Tensor:
        """From the gradient of the mixed values (T, heads D) that of qkv (T, n, D)."""
        dim = self.heads.dim
        given = dy.new_zeros(sum(self.asked), dim)
        given.index_copy_(0, self.answers, dy.view(-1, dim))
        gradients = dy.new_empty(len(self.ids), dim)
        into = iter(gradients.split(self.sizes))
        for bucket, asked, memory in zip(self.buckets, given.split(self.asked), kept, strict=True):
            bucket.backward(asked, memory, [next(into) for _ in bucket.parts])
        dqkv = F.embedding(self.own, gradients)
        if len(self.borrowed):
            dqkv.index_add_(0, self.lenders, F.embedding(self.borrowed, gradients))
        return dqkv.view(len(dy), -1, dim)


class ShortRows:
    """A bucket whose probabilities are written out, by products of many small matrices.

    It takes the queries (G, kv_heads, R, h, C), its rows' own keys and values (G, kv_heads, R, C),
    then those of the beginnings (G, kv_heads, P).
    """

    def __init__(self, bucket: Bucket, heads: Heads, device: torch.device) -> None:
        (groups, rows, own), before = bucket.queries.shape, bucket.lent.shape[1]
        self.heads, self.before = heads, before
        h = heads.count // heads.kv_count
        self.row = groups * heads.kv_count * rows, -1, heads.dim  # h C queries, C keys of a row
        self.group = groups * heads.kv_count, -1, heads.dim  # R h C queries, P keys of a group
        queries, real = bucket.queries[:, None], bucket.real[:, None]  # (G, 1, R, C)
        asking = heads.queries.reshape(-1, 1, h, 1)
        self.parts = [part(queries[..., None, :], asking, heads, own=real[..., None, :])]
        for which in (heads.keys, heads.values):
            self.parts.append(part(queries, which.reshape(-1, 1, 1), heads, own=real))
        if before:
            lent, borrowed = bucket.lent[:, None], bucket.borrowed[:, None]  # (G, 1, P)
            for which in (heads.keys, heads.values):
                self.parts.append(part(lent, which.reshape(-1, 1), heads, borrowed=borrowed))
        future = np.triu(np.ones((own, own), dtype=bool), 1)
        self.future = mask(np.tile(future, (h, 1)), device)  # (h C, C)
        no_loan = ~np.repeat(bucket.borrowed, heads.kv_count, axis=0)
        self.no_loan = mask(no_loan[:, None], device)  # (G kv_heads, 1, P)

    def forward(self, parts: list[Tensor], into: Tensor, training: bool) -> Any:
        """Write the answers, in the order of the queries; give what `backward` needs."""
        q, k, v = (each.view(self.row) for each in parts[:3])
        lent = [each.view(self.group) for each in parts[3:]]  # keys and values, if there are any
        masks = self.future, self.no_loan
        probs = attend(q, k, v, lent, masks, self.heads.scale, into.view(self.row))
        return q, k, v, probs, *lent

    def backward(self, given: Tensor, kept: Any, into: list[Tensor]) -> None:
        """Write the gradients of the parts from that of the answers."""
        q, k, v, probs, *lent = kept
        scale, dy = self.heads.scale, given.view(self.row)
        dq, dk, dv = (each.view(self.row) for each in into[:3])
        dp = torch.bmm(dy, v.transpose(1, 2))
        if lent:
            asked, dy_group, dq_group, dk_lent, dv_lent = (
                each.view(self.group) for each in (q, given, into[0], *into[3:])
            )
            lent_k, lent_v = lent
            dp_lent = torch.bmm(dy_group, lent_v.transpose(1, 2))
            dp = torch.cat([dp_lent.view(*dp.shape[:2], -1), dp], dim=-1)
        ds = torch._softmax_backward_data(dp, probs, -1, dp.dtype)
        ds_own = self.own(ds)
        torch.bmm(self.own(probs).transpose(1, 2), dy, out=dv)
        torch.baddbmm(dq, ds_own, k, beta=0, alpha=scale, out=dq)
        torch.baddbmm(dk, ds_own.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
        if lent:
            ds_shared = self.shared(ds)
            torch.bmm(self.shared(probs).transpose(1, 2), dy_group, out=dv_lent)
            dq_group.baddbmm_(ds_shared, lent_k, alpha=scale)
            torch.baddbmm(
                dk_lent, ds_shared.transpose(1, 2), asked, beta=0, alpha=scale, out=dk_lent
            )

    def own(self, values: Tensor) -> Tensor:
        """Of a value for each pair of query and key, those of the own keys, by row."""
        return values[..., self.before :]

    def shared(self, values: Tensor) -> Tensor:
        """Those of the beginning, by group."""
        return values[..., : self.before].view(self.group[0], -1, self.before)


class LongRows:
    """A bucket that takes torch's own function.

    It takes the queries (G, R, heads, C), then keys and values (G, R, kv_heads, L).
    """

    def __init__(self, bucket: Bucket, heads: Heads, device: torch.device) -> None:
        (groups, rows, own), before = bucket.queries.shape, bucket.lent.shape[1]
        self.heads, self.rows = heads, groups * rows
        queries, real = bucket.queries[:, :, None], bucket.real[:, :, None]  # (G, R, 1, C)
        lent, borrowed = (
            np.broadcast_to(each[:, None, None], (groups, rows, 1, before))
            for each in (bucket.lent, bucket.borrowed)
        )
        seen = np.concatenate([lent, queries], axis=-1)  # (G, R, 1, L)
        own_keys = np.concatenate([np.zeros_like(borrowed), real], axis=-1)
        lent_keys = np.concatenate([borrowed, np.zeros_like(real)], axis=-1)
        self.parts = [part(queries, heads.queries[:, None], heads, own=real)]
        for which in (heads.keys[:, None], heads.values[:, None]):
            self.parts.append(part(seen, which, heads, own=own_keys, borrowed=lent_keys))
        self.mask = None  # causal attention is enough
        if before:
            hidden = np.triu(np.ones((own, before + own), dtype=bool), before + 1)  # the future
            hidden = np.tile(hidden, (self.rows, 1, 1, 1))  # (G R, 1, C, L)
            hidden[..., :before] |= ~borrowed.reshape(self.rows, 1, 1, before)
            self.mask = mask(hidden, device)

    def forward(self, parts: list[Tensor], into: Tensor, training: bool) -> Any:
        """Write the answers, in the order of the queries; give what `backward` needs."""
        with torch.set_grad_enabled(training):
            q, k, v = (each.requires_grad_(training) for each in parts)
            counts = (self.heads.count, self.heads.kv_count, self.heads.kv_count)
            mixed = F.scaled_dot_product_attention(
                *(
                    each.view(self.rows, count, -1, self.heads.dim)
                    for each, count in zip((q, k, v), counts, strict=True)
                ),
                attn_mask=self.mask,
                is_causal=self.mask is None,
                enable_gqa=self.heads.count != self.heads.kv_count,
            )
        into.view(mixed.shape).copy_(mixed.detach())
        return q, k, v, mixed

    def backward(self, given: Tensor, kept: Any, into: list[Tensor]) -> None:
        """Write the gradients of the parts from that of the answers."""
        *parts, mixed = kept
        for to, gradient in zip(
            into, torch.autograd.grad(mixed, parts, given.view(mixed.shape)), strict=True
        ):
            to.copy_(gradient)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lent: Sequence[Tensor],
    masks: tuple[Tensor, Tensor | None],
    scale: float,
    into: Tensor,
) -> Tensor:
    """Attention of many small rows, softmax(scale q k^T + mask) v, written `into` (N, Q, D).

    q (N, Q, D) asks k and v (N, C, D), and, where there are any, the keys and values `lent` to
    groups of rows that follow one another, (N / R, P, D). The masks go on the scores, (N, Q, C) and
    (N / R, R Q, P). Returns the probabilities (N, Q, P + C).
    """
    scores = torch.baddbmm(masks[0], q, k.transpose(1, 2), alpha=scale)
    before = 0
    if lent:
        (lent_k, lent_v), before = lent, lent[0].shape[1]
        asked = q.view(len(lent_k), -1, q.shape[2])
        of_lent = torch.baddbmm(masks[1], asked, lent_k.transpose(1, 2), alpha=scale)
        scores = torch.cat([of_lent.view(*scores.shape[:2], -1), scores], dim=-1)
    probs = scores.softmax(-1)
    torch.bmm(probs[..., before:], v, out=into)
    if lent:
        of_groups = probs[..., :before].view(*of_lent.shape)
        into.view(asked.shape).baddbmm_(of_groups, lent_v)
    return probs


def part(
    tokens: np.ndarray,
    which: np.ndarray,
    heads: Heads,
    own: np.ndarray | bool = False,
    borrowed: np.ndarray | bool = False,
) -> Part:
    """These of the n vectors of these tokens; all arrays are broadcast together."""
    ids = tokens * heads.vectors + which
    return Part(ids, np.broadcast_to(own, ids.shape), np.broadcast_to(borrowed, ids.shape))


def mask(hidden: np.ndarray, device: torch.device) -> Tensor:
    """Minus infinity where hidden, else 0."""
    values = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), float("-inf"))
    return values.to(device)
