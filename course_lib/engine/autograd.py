"""Two operations whose gradients are written out, because torch works them out more slowly.

`HiddenStates` is a Llama from tokens to hidden states: torch would make a node of each of a hundred
small operations, copy where parts are put together again, and multiply by zeros. `TargetLogprobs`
goes from hidden states to log-probabilities of chosen tokens and keeps one array of the
vocabulary's width where plain autograd keeps three.

Legend: T packed tokens, H hidden size, F width of the MLP, r rank of the adapters.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from course_lib.engine.attention import Attention
from course_lib.engine.llama import Llama, Matrix, Step, Weights
from course_lib.engine.lora import ALPHA
from course_lib.engine.packing import Packed

FEW = 0.8  # with a gradient at fewer tokens than this share, the last layer computes for them alone


class HiddenStates(torch.autograd.Function):
    """Packed tokens -> their last hidden states (T, H); gradients for the adapters alone."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, llama: Llama, weights: Weights, packed: Packed, *adapters: Tensor
    ) -> Tensor:
        attention = Attention(packed, llama.heads, llama.kv_heads, llama.dim)
        tape: list[Step] | None = [] if any(ctx.needs_input_grad) else None
        kept: list | None = None if tape is None else []
        hidden, scale = llama.hidden(
            weights,
            packed.tokens,
            packed.positions,
            lambda layer, qkv: attention(qkv, kept),
            tape,
        )
        ctx.save_for_backward(hidden)
        ctx.way = llama, weights, attention, llama.rotations[packed.positions].unsqueeze(1)
        ctx.tape, ctx.kept, ctx.scale = tape, kept, scale
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor):
        (hidden,) = ctx.saved_tensors
        llama, weights, attention, rotations = ctx.way
        back = rotations.conj().resolve_conj()
        gradients: list[list[Tensor]] = []
        # Where no token has a loss, nothing flows back into the last layer but through attention.
        live = dy.abs().sum(-1).nonzero().squeeze(-1)
        few = len(live) < FEW * len(dy)
        ends = [each.index_select(0, live) if few else each for each in (dy, hidden, ctx.scale)]
        dx = norm_backward(*ends)
        for index in reversed(range(len(weights.layers))):
            layer, step, kept = weights.layers[index], ctx.tape.pop(), ctx.kept.pop()
            top = few and index == len(weights.layers) - 1
            at = step.of(live) if top else step
            gate, up = at.gate_up.chunk(2, dim=-1)
            dh, down = matrix_backward(layer.down, dx, at.swished * up)
            dgate_up = torch.empty_like(at.gate_up)
            dgate, dup = dgate_up.chunk(2, dim=-1)
            torch.mul(dh, at.swished, out=dup)
            torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dgate)
            dsecond, gate_up = matrix_backward(layer.gate_up, dgate_up, at.second)
            dx = norm_backward(dsecond, at.second, at.second_scale, dx)
            dmixed, out = matrix_backward(layer.out, dx, at.mixed)
            if top:
                dx = dx.new_zeros(len(dy), dx.shape[1]).index_copy_(0, live, dx)
                dmixed = dmixed.new_zeros(len(dy), dmixed.shape[1]).index_copy_(0, live, dmixed)
            dqkv = llama.rotated(attention.backward(dmixed, kept), back).view(len(dy), -1)
            dfirst, qkv = matrix_backward(layer.qkv, dqkv, step.first, wanted=index > 0)
            if dfirst is not None:
                dx = norm_backward(dfirst, step.first, step.first_scale, dx)
            gradients += [down, gate_up, out, qkv]
        return None, None, None, *chain.from_iterable(reversed(gradients))


def matrix_backward(
    matrix: Matrix, dy: Tensor, x: Tensor, wanted: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of x (if wanted) and of the adapters, A first, for y = x W^T.

    W is W0 + (alpha / r) B A; with s = alpha / r and u = dy B:  dA = s u^T x,  dB = s dy^T (x A^T).
    """
    dx = dy @ matrix.weight if wanted else None
    if matrix.a is None:
        return dx, []
    rank = matrix.bs[0].shape[1]
    scale = ALPHA / rank
    down = x @ matrix.a.T  # (T, adapters * r)
    u = torch.empty_like(down)
    dbs = []
    for index, (b, (first, last)) in enumerate(zip(matrix.bs, matrix.blocks, strict=True)):
        part = slice(index * rank, (index + 1) * rank)
        torch.mm(dy[:, first:last], b, out=u[:, part])
        dbs.append((down[:, part].T @ dy[:, first:last]).mul_(scale).T)  # of few rows: faster
    return dx, [(u.T @ x).mul_(scale), *dbs]


def norm_backward(dy: Tensor, y: Tensor, scale: Tensor, to: Tensor | None = None) -> Tensor:
    """The gradient of the input of `llama.norm`, c (dy - y mean(dy y)); added to `to` in place."""
    mean = torch.linalg.vecdot(dy, y).div_(y.shape[-1]).unsqueeze(-1)
    inner = torch.addcmul(dy, y, mean, value=-1)
    return inner.mul_(scale) if to is None else to.addcmul_(inner, scale)


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
        dlogits = logprobs.index_select(0, rows).exp_().mul_(-total.unsqueeze(-1))  # (R, V)
        dlogits.index_put_((place.unsqueeze(-1), targets), dy, accumulate=True)
        dh = da = db = None
        if ctx.needs_input_grad[0]:
            dh = torch.zeros_like(hidden).index_copy_(0, rows, dlogits @ weight)
        if a is not None and b is not None:
            scale, h = ALPHA / len(a), hidden.index_select(0, rows)
            da = ((dlogits @ b).T @ h).mul_(scale)
            db = (dlogits.T @ (h @ a.T)).mul_(scale)
        return dh, None, da, db, None, None
