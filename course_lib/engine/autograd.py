"""Three operations whose gradients torch would work out more slowly.

`LoraLinear` multiplies by a frozen weight with the adapter folded in, and gives gradients to the
adapter alone; `RMSNorm` passes over its input a few times less; `TargetLogprobs` goes from hidden
states to log-probabilities of chosen tokens and keeps one array of the vocabulary's width where
plain autograd keeps three.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from course_lib.engine.lora import ALPHA


class LoraLinear(torch.autograd.Function):
    """y = x W^T with W = W0 + (alpha / r) B A: gradients for x, A and B, none for W0.

    Rows `blocks[i]` of W carry adapter i: its A is the i-th part of `a` (adapters * r, in), its B
    is `bs[i]` (rows, r). With s = alpha / r and u = dy B:  dA = s u^T x  and  dB = s dy^T (x A^T).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        blocks: tuple[tuple[int, int], ...],
        a: Tensor,
        *bs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, *bs)
        ctx.blocks = blocks
        return x @ weight.T

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor):
        x, weight, a, *bs = ctx.saved_tensors
        rank = bs[0].shape[1]
        scale = ALPHA / rank
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        down = x @ a.T  # (T, adapters * r)
        u = torch.empty_like(down)
        dbs = []
        for index, (b, (first, last)) in enumerate(zip(bs, ctx.blocks, strict=True)):
            part = slice(index * rank, (index + 1) * rank)
            torch.mm(dy[:, first:last], b, out=u[:, part])
            dbs.append((dy[:, first:last].T @ down[:, part]).mul_(scale))
        return dx, None, None, (u.T @ x).mul_(scale), *dbs


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019), without a learned scale.

    With c = 1 / sqrt(...):  dx = c (dy - y mean(dy y)).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, eps: float) -> Tensor:
        c = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        y = x * c
        ctx.save_for_backward(y, c)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor):
        y, c = ctx.saved_tensors
        mean = torch.linalg.vecdot(dy, y).div_(y.shape[-1]).unsqueeze(-1)
        return torch.addcmul(dy, y, mean, value=-1).mul_(c), None


class TargetLogprobs(torch.autograd.Function):
    """log softmax(h W^T) at chosen places: row `source[m]`, token `targets[m, k]` -> (M, K)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        source: Tensor,
        targets: Tensor,
    ) -> Tensor:
        logprobs = torch.log_softmax(hidden @ weight.T, dim=-1)  # (T, V)
        ctx.save_for_backward(hidden, weight, a, b, source, targets, logprobs)
        return logprobs[source.unsqueeze(-1), targets]

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor):
        hidden, weight, a, b, source, targets, logprobs = ctx.saved_tensors
        wanted = (dy != 0).any(-1).nonzero().squeeze(-1)  # prompts have no loss, so no gradient
        dy, targets = dy[wanted], targets[wanted]
        rows, place = source[wanted].unique(return_inverse=True)  # (R,) tokens with a gradient
        total = dy.new_zeros(len(rows)).index_add_(0, place, dy.sum(-1))
        dlogits = logprobs[rows].exp_().mul_(-total.unsqueeze(-1))  # (R, V)
        dlogits.index_put_((place.unsqueeze(-1), targets), dy, accumulate=True)
        dh = da = db = None
        if ctx.needs_input_grad[0]:
            dh = torch.zeros_like(hidden)
            dh[rows] = dlogits @ weight
        if a is not None and b is not None:
            scale, h = ALPHA / len(a), hidden[rows]
            da = ((dlogits @ b).T @ h).mul_(scale)
            db = (dlogits.T @ (h @ a.T)).mul_(scale)
        return dh, None, da, db, None, None
