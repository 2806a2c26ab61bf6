"""How do packed rows attend? Bucket by bucket, forwards and backwards, without autograd.

Short rows take plain products and a softmax, whose probabilities are kept for the way back: on two
cores they need half to a third of the time of `scaled_dot_product_attention`, which shares its work
out badly where rows are short. Long rows take that function, which keeps no probabilities.

Legend: T packed tokens, D dimensions of a head, n = heads + 2 kv_heads vectors a token has (its
queries, keys and values, in this order); for a bucket S rows, C queries and L keys of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.engine.packing import Bucket, Packed

SHORT = 96  # keys of a row up to which its probabilities are written out


@dataclass
class Place:
    """Where a bucket's vectors stand among the gathered ones, and how it attends."""

    bucket: Bucket
    parts: list[slice]  # its queries, keys and values
    answers: slice
    mask: Tensor | None  # (S kv_heads, heads / kv_heads C, L), or (S, 1, C, L) for a long bucket


class Attention:
    """Attention over one layout; every layer uses the same.

    All vectors that a layer's buckets need are gathered at once, and their gradients on the way
    back, too: each vector stands once in its own row, those of a shared beginning also in others.
    """

    def __init__(self, packed: Packed, heads: int, kv_heads: int, dim: int) -> None:
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.places: list[Place] = []
        self.device = packed.tokens.device
        vectors = heads + 2 * kv_heads
        ids, mine, lent, asked = [], [], [], []  # for each gathered vector; asked: for each query
        at = answered = 0
        for bucket in packed.buckets:
            no_key, no_loan = np.zeros_like(bucket.borrowed), np.zeros_like(bucket.real)
            own_keys = np.concatenate([no_key, bucket.real], axis=1)  # (S, L)
            lent_keys = np.concatenate([bucket.borrowed, no_loan], axis=1)
            parts = []
            for first, count, tokens, own, loan in (
                (0, heads, bucket.queries, bucket.real, no_loan),
                (heads, kv_heads, bucket.keys, own_keys, lent_keys),
                (heads + kv_heads, kv_heads, bucket.keys, own_keys, lent_keys),
            ):
                which = first + np.arange(count)[:, None]
                ids.append((tokens[:, None] * vectors + which).ravel())  # (S, count, C or L)
                mine.append(np.repeat(own[:, None], count, axis=1).ravel())
                lent.append(np.repeat(loan[:, None], count, axis=1).ravel())
                parts.append(slice(at, at := at + ids[-1].size))
            asked.append(mine[-3])  # the queries; keys and values come after them
            queries = slice(answered, answered := answered + asked[-1].size)
            self.places.append(Place(bucket, parts, queries, self.mask(bucket)))
        # Where each of the T n vectors stands in its own row, and each of the T heads answers.
        all_ids, all_mine = np.concatenate(ids), np.concatenate(mine)
        own_places = np.empty(len(packed.tokens) * vectors, dtype=np.int64)
        own_places[all_ids[all_mine]] = np.flatnonzero(all_mine)
        token, head = np.divmod(np.concatenate(ids[::3])[real := np.concatenate(asked)], vectors)
        answers = np.empty(len(packed.tokens) * heads, dtype=np.int64)
        answers[token * heads + head] = np.flatnonzero(real)
        borrowed = np.flatnonzero(np.concatenate(lent))
        self.asked = answered
        self.ids, self.own, self.answers, self.borrowed, self.lenders = (
            torch.from_numpy(each).to(self.device)
            for each in (all_ids, own_places, answers, borrowed, all_ids[borrowed])
        )

    def short(self, bucket: Bucket) -> bool:
        return bucket.keys.shape[1] <= SHORT

    def mask(self, bucket: Bucket) -> Tensor | None:
        """0 or minus infinity for each pair of query and key; None: causal attention is enough."""
        (rows, own), before = bucket.queries.shape, bucket.borrowed.shape[1]
        if not before and not self.short(bucket):
            return None
        hidden = np.triu(np.ones((own, before + own), dtype=bool), before + 1)  # the future
        hidden = np.repeat(hidden[None], rows, axis=0)
        hidden[:, :, :before] |= ~bucket.borrowed[:, None]
        mask = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        mask = mask.to(self.device).unsqueeze(1)  # (S, 1, C, L)
        if not self.short(bucket):
            return mask
        mask = mask.unsqueeze(1).expand(-1, self.kv_heads, self.heads // self.kv_heads, -1, -1)
        return mask.reshape(rows * self.kv_heads, -1, before + own)

    def __call__(self, qkv: Tensor, tape: list | None = None) -> Tensor:
        """qkv (T, n, D) -> the mixed values (T, heads D); the tape gets what `backward` needs."""
        vectors = F.embedding(self.ids, qkv.view(-1, self.dim))  # torch's fastest gather
        answers = vectors.new_empty(self.asked, self.dim)
        kept = []
        for place in self.places:
            q, k, v = (self.batch(vectors[part], place) for part in place.parts)
            into = self.batch(answers[place.answers], place)
            if self.short(place.bucket):
                scores = torch.baddbmm(place.mask, q, k.transpose(1, 2), alpha=self.dim**-0.5)
                probs = scores.softmax(-1)
                torch.bmm(probs, v, out=into)
                kept.append((q, k, v, probs))
            else:
                with torch.set_grad_enabled(tape is not None):
                    inputs = [part.requires_grad_(tape is not None) for part in (q, k, v)]
                    mixed = self.long(inputs, place)
                into.copy_(mixed.detach())
                kept.append((*inputs, mixed))
        if tape is not None:
            tape.append(kept)
        return F.embedding(self.answers, answers).view(len(qkv), -1)

    def backward(self, dy: Tensor, kept: list) -> Tensor:
        """From the gradient of the mixed values (T, heads D) that of qkv (T, n, D)."""
        asked = dy.new_zeros(self.asked, self.dim)
        asked.index_copy_(0, self.answers, dy.view(-1, self.dim))
        gradients = dy.new_empty(len(self.ids), self.dim)
        scale = self.dim**-0.5
        for place, (q, k, v, last) in zip(self.places, kept, strict=True):
            dq, dk, dv = (self.batch(gradients[part], place) for part in place.parts)
            given = self.batch(asked[place.answers], place)
            if self.short(place.bucket):
                torch.bmm(last.transpose(1, 2), given, out=dv)
                dp = torch.bmm(given, v.transpose(1, 2))
                ds = torch._softmax_backward_data(dp, last, -1, dp.dtype)
                torch.baddbmm(dq, ds, k, beta=0, alpha=scale, out=dq)
                torch.baddbmm(dk, ds.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
            else:
                for into, part in zip(
                    (dq, dk, dv), torch.autograd.grad(last, (q, k, v), given), strict=True
                ):
                    into.copy_(part)
        dqkv = F.embedding(self.own, gradients)
        if len(self.borrowed):
            dqkv.index_add_(0, self.lenders, F.embedding(self.borrowed, gradients))
        return dqkv.view(len(dy), -1, self.dim)

    def batch(self, vectors: Tensor, place: Place) -> Tensor:
        """A bucket's vectors as a batch of matrices (S kv_heads, queries or keys, D)."""
        return vectors.view(place.bucket.rows * self.kv_heads, -1, self.dim)

    def long(self, qkv: list[Tensor], place: Place) -> Tensor:
        """The mixed values of a bucket of long rows."""
        (q, k, v), rows = qkv, place.bucket.rows
        mixed = F.scaled_dot_product_attention(
            q.view(rows, self.heads, -1, self.dim),
            k.view(rows, self.kv_heads, -1, self.dim),
            v.view(rows, self.kv_heads, -1, self.dim),
            attn_mask=place.mask,
            is_causal=place.mask is None,
            enable_gqa=self.heads != self.kv_heads,
        )
        return mixed.reshape(q.shape)
