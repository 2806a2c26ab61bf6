"""What is a step? `forward_backward` adds gradients up, `optim_step` uses them.

    for each micro-batch:  tokens -> logits -> log p(targets) -> loss (course_lib.losses)
                           -> gradients of A and B
    optim_step:            clip by global norm, AdamW (torch's own), forget the gradients

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
from course_lib.engine.cores import cores_for
from course_lib.engine.model import BaseModel
from course_lib.engine.requests import (
    BLOWN_UP,
    AdamParams,
    RequestError,
    TrainDatum,
    TrainRequest,
    TrainResult,
)
from course_lib.engine.scoring import flat, micro_batches, score
from course_lib.engine.validation import check_adam, check_train
from course_lib.errors import CourseError
from course_lib.losses import LOSS_INPUTS, LOSSES

PER_SEQUENCE = ("gspo",)  # its loss of a token depends on the row's other tokens


def forward_backward(base: BaseModel, adapter: Adapter, request: TrainRequest) -> TrainResult:
    """Log-probabilities and loss of the data; the adapter gains gradients, if so asked."""
    check_train(request, base.vocab_size, base.context_length)
    with cores_for(base.parameter_count, sum(len(datum.tokens) for datum in request.data)):
        return _forward_backward(base, adapter, request)


def _forward_backward(base: BaseModel, adapter: Adapter, request: TrainRequest) -> TrainResult:
    outputs: list[dict[str, np.ndarray]] = [{}] * len(request.data)
    total = 0.0
    try:
        for rows in micro_batches(base, request.data):
            batch = [request.data[row] for row in rows]
            with torch.set_grad_enabled(not request.forward_only):
                logprobs = score(base, adapter, batch)  # (M,) or (M, K)
                loss = token_losses(request, batch, logprobs).sum()
            value = loss.item()  # on a GPU it waits for all that was asked before
            if not math.isfinite(value):
                raise not_finite(f"the loss is {value}", adapter, request.loss_fn)
            total += value
            if loss.requires_grad:
                loss.backward(retain_graph=True)  # the arranged weights serve the next batch, too
            for row, values in zip(rows, split(logprobs.detach().cpu(), batch), strict=True):
                outputs[row] = {"logprobs": values.numpy()}
            del logprobs, loss  # and with them the activations
        if not request.forward_only and not adapter.add_gradients():
            raise not_finite("the gradient is not finite", adapter, request.loss_fn)
    except CourseError as error:  # a loss refuses its configuration
        raise RequestError(str(error)) from error
    finally:
        for parameter in adapter.parameters.values():
            parameter.grad = None
    return TrainResult(outputs, {"loss:sum": total})


def token_losses(request: TrainRequest, batch: list[TrainDatum], logprobs: Tensor) -> Tensor:
    """The loss of every token of a micro-batch, rows end to end: (M,) or (M, K)."""
    loss_fn, config = LOSSES[request.loss_fn], cast(dict[str, float], request.loss_fn_config)
    inputs = {
        name: flat([datum.loss_fn_inputs[name] for datum in batch], logprobs.device).float()
        for name in LOSS_INPUTS[request.loss_fn]
    }
    if request.loss_fn not in PER_SEQUENCE:
        return loss_fn(logprobs, inputs, config)
    parts = {name: split(values, batch) for name, values in inputs.items()}
    return torch.cat(
        [
            loss_fn(row, {name: parts[name][index] for name in parts}, config)
            for index, row in enumerate(split(logprobs, batch))
        ]
    )


def split(values: Tensor, batch: list[TrainDatum]) -> list[Tensor]:
    """Rows that were joined end to end, apart again, without the columns that were filled up."""
    shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in batch]
    rows = values.split([shape[0] for shape in shapes])
    if values.dim() == 1:
        return list(rows)
    return [row[:, : shape[1]] for row, shape in zip(rows, shapes, strict=True)]


def optim_step(adapter: Adapter, params: AdamParams) -> dict[str, float]:
    """One AdamW step with the gradients since the last one; gives their norm before clipping.

    Without gradients nothing moves, as in torch.
    """
    check_adam(params)
    if adapter.gradients is None:
        return {"grad_norm:mean": 0.0}
    with cores_for(adapter.flat.numel(), 1):
        norm = _adamw_step(adapter, params)
    adapter.gradients = None
    adapter.version += 1
    return {"grad_norm:mean": norm}


def _adamw_step(adapter: Adapter, params: AdamParams) -> float:
    adapter.flat.grad = adapter.gradients
    norm = torch.linalg.vector_norm(adapter.gradients)
    if params.grad_clip_norm:
        torch.nn.utils.clip_grads_with_norm_(adapter.flat, params.grad_clip_norm, norm)
    adapter.optimizer.param_groups[0].update(
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    adapter.optimizer.step()
    adapter.optimizer.zero_grad()
    return float(norm)


def prepare(base: BaseModel, adapter: Adapter) -> None:
    """Fold the adapter into the weights before anybody waits for it."""
    if base.llama is not None and adapter.parameters:  # it may have been deleted meanwhile
        with cores_for(base.parameter_count, adapter.spec.rank):
            base.arranged(base.llama, adapter)


def not_finite(finding: str, adapter: Adapter, loss_fn: str) -> RequestError:
    """The finding with its likeliest cause."""
    if bool(adapter.flat.isfinite().all()) and "logprobs" in LOSS_INPUTS[loss_fn]:
        return RequestError(f"{finding}; are the sampling logprobs those of this policy?")
    return RequestError(f"{finding}; {BLOWN_UP}")
