"""What is a step? `forward_backward` adds gradients up, `optim_step` uses them.

    for each micro-batch:  tokens -> logits -> log p(targets) -> loss (course_lib.losses) ->
    gradients of A and B optim_step:            clip by global norm, AdamW (torch's own), forget the
    gradients

Everything is checked before anything is computed, and gradients join the accumulated ones only when
the whole request has succeeded: a failing request changes nothing. Losses are summed, never
averaged.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor

from course_lib.engine.adapter import Adapter
from course_lib.engine.model import BaseModel
from course_lib.engine.requests import (
    AdamParams,
    RequestError,
    TrainDatum,
    TrainRequest,
    TrainResult,
)
from course_lib.engine.validation import check_adam, check_train
from course_lib.errors import CourseError
from course_lib.losses import LOSSES

ACTIVATION_BYTES = 1 << 30  # what one micro-batch may keep for its backward pass


def forward_backward(base: BaseModel, adapter: Adapter, request: TrainRequest) -> TrainResult:
    """Log-probabilities and loss of each datum; unless `forward_only`, gradients are added to the adapter's."""
    check_train(request, base.vocab_size, base.context_length)
    model = base.activate(adapter)
    parameters = list(adapter.parameters.values())
    logprobs: list[np.ndarray | None] = [None] * len(request.data)
    config = cast(dict[str, float], request.loss_fn_config)  # the losses refuse what is no number
    total = 0.0
    try:
        for rows in micro_batches(base, request.data):
            batch = [request.data[row] for row in rows]
            with torch.set_grad_enabled(not request.forward_only):
                lp = target_logprobs(model, batch, base.device)  # (B, N) or (B, N, K)
                losses = LOSSES[request.loss_fn](lp, loss_inputs(batch, base.device), config)
                loss = losses[real_tokens(batch, base.device)].sum()
            total += finite(loss.item(), "the loss")
            if loss.requires_grad:
                loss.backward()
            for row, datum, values in zip(rows, batch, lp.detach().cpu(), strict=True):
                shape = datum.loss_fn_inputs["target_tokens"].shape
                logprobs[row] = values[tuple(slice(size) for size in shape)].numpy()
        if not request.forward_only:
            adapter.add_gradients()
    except CourseError as error:  # a loss refuses its configuration
        raise RequestError(str(error)) from error
    finally:
        for parameter in parameters:
            parameter.grad = None
    outputs = [{"logprobs": values} for values in logprobs if values is not None]
    return TrainResult(outputs, {"loss:sum": total})


def optim_step(adapter: Adapter, params: AdamParams) -> dict[str, float]:
    """One AdamW step with the gradients added up since the last one; returns their norm before clipping.

    Without gradients nothing moves, as in torch.
    """
    check_adam(params)
    if adapter.gradients is None:
        return {"grad_norm:mean": 0.0}
    for parameter, gradient in zip(adapter.parameters.values(), adapter.gradients, strict=True):
        parameter.grad = gradient
    max_norm = params.grad_clip_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(adapter.parameters.values(), max_norm)
    adapter.optimizer.param_groups[0].update(
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    adapter.optimizer.step()
    adapter.optimizer.zero_grad()
    adapter.gradients = None
    adapter.version += 1
    return {"grad_norm:mean": float(norm)}


def micro_batches(base: BaseModel, data: list[TrainDatum]) -> list[list[int]]:
    """Rows of like shape and similar length together, within the memory for a backward pass."""

    def shape(row: int) -> tuple[int, int]:
        return data[row].loss_fn_inputs["target_tokens"].ndim, len(data[row].tokens)

    limit = max(1, ACTIVATION_BYTES // bytes_per_token(base))
    batches: list[list[int]] = []
    for row in sorted(range(len(data)), key=shape, reverse=True):
        columns, longest = shape(batches[-1][0]) if batches else (0, 0)
        if columns != shape(row)[0] or (len(batches[-1]) + 1) * longest > limit:
            batches.append([])
        batches[-1].append(row)
    return batches


def bytes_per_token(base: BaseModel) -> int:
    """About what the backward pass needs to remember of one token: a decoder's activations and the logits."""
    config = base.config
    layer = 16 * config.hidden_size + 6 * (getattr(config, "intermediate_size", None) or 0)
    return 4 * (config.num_hidden_layers * layer + 3 * base.vocab_size)


def target_logprobs(
    model: torch.nn.Module, batch: list[TrainDatum], device: torch.device
) -> Tensor:
    """log p of every target token: (B, N), or (B, N, K) with K targets for each position.

    Rows are padded on the right, so causal attention alone keeps the padding out of sight.
    """
    tokens = pad([datum.tokens for datum in batch], torch.long, device)  # (B, N)
    targets = pad([datum.loss_fn_inputs["target_tokens"] for datum in batch], torch.long, device)
    logits = model(input_ids=tokens, use_cache=False).logits.float()  # (B, N, V)
    columns = targets if targets.dim() == 3 else targets.unsqueeze(-1)  # (B, N, K)
    chosen = logits.gather(-1, columns) - logits.logsumexp(-1, keepdim=True)
    return chosen if targets.dim() == 3 else chosen.squeeze(-1)


def loss_inputs(batch: list[TrainDatum], device: torch.device) -> dict[str, Tensor]:
    """The loss inputs of a micro-batch, padded with zeros: each (B, N) or (B, N, K)."""
    names = [name for name in batch[0].loss_fn_inputs if name != "target_tokens"]
    return {
        name: pad([datum.loss_fn_inputs[name] for datum in batch], torch.float32, device)
        for name in names
    }


def real_tokens(batch: list[TrainDatum], device: torch.device) -> Tensor:
    """True (B, N) where a row has a token, False where it is padded."""
    lengths = torch.tensor([len(datum.tokens) for datum in batch], device=device)
    return torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(-1)


def pad(rows: list[np.ndarray], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of different length (and, with K columns, width) in one tensor, zeros on the right."""
    length = max(len(row) for row in rows)
    width = [max(row.shape[1] for row in rows)] if rows[0].ndim == 2 else []
    padded = torch.zeros(len(rows), length, *width, dtype=dtype)
    for into, row in zip(padded, rows, strict=True):
        into[tuple(slice(size) for size in row.shape)] = torch.from_numpy(np.ascontiguousarray(row))
    return padded.to(device)


def finite(value: float, what: str) -> float:
    """The value, unless it is infinite or not a number."""
    if not math.isfinite(value):
        raise RequestError(f"{what} is {value}; are the sampling logprobs those of this policy?")
    return value
