"""May this request be computed? Checks before any work; a refusal names datum and field."""

from __future__ import annotations

import math

import numpy as np

from course_lib.engine.requests import (
    AdamParams,
    RequestError,
    SampleRequest,
    TrainDatum,
    TrainRequest,
)
from course_lib.losses import LOSS_INPUTS, LOSSES


def check_train(request: TrainRequest, vocab_size: int, context_length: int) -> None:
    """Refuse a training request whose loss, tokens or loss inputs cannot be computed with."""
    if request.loss_fn not in LOSSES:
        raise RequestError(f"loss_fn {request.loss_fn!r} is not here; there is {', '.join(LOSSES)}")
    if not request.data:
        raise RequestError("data is empty; give at least one datum")
    wanted = ("target_tokens", *LOSS_INPUTS[request.loss_fn])
    for index, datum in enumerate(request.data):
        try:
            check_datum(datum, request.loss_fn, wanted, vocab_size, context_length)
        except RequestError as error:
            raise RequestError(f"data[{index}].{error}") from None


def check_datum(
    datum: TrainDatum, loss_fn: str, wanted: tuple[str, ...], vocab_size: int, context_length: int
) -> None:
    """Refuse tokens that are too many or none at all, and loss inputs that are missing, unused,
    misshapen, not finite or no tokens."""
    check_tokens(datum.tokens, "model_input", vocab_size)
    length = len(datum.tokens)
    if length > context_length:
        finding = f"{length} tokens; the model's context window is {context_length}"
        raise RequestError(f"model_input has {finding}")
    inputs, place = datum.loss_fn_inputs, "loss_fn_inputs"
    for name in wanted:
        if name not in inputs:
            raise RequestError(f"{place} lacks {name!r}; {loss_fn} takes {', '.join(wanted)}")
    for name in inputs:
        if name not in wanted:
            raise RequestError(
                f"{place}[{name!r}] is not used by {loss_fn}, which takes {', '.join(wanted)}"
            )
    targets = inputs["target_tokens"]
    check_tokens(targets, "loss_fn_inputs['target_tokens']", vocab_size)
    shape = targets.shape
    if shape[0] != length or len(shape) > (2 if loss_fn == "cross_entropy" else 1):
        expected = f"({length},) or ({length}, K)" if loss_fn == "cross_entropy" else f"({length},)"
        raise RequestError(f"{place}['target_tokens'] has shape {shape}; it must be {expected}")
    for name in wanted[1:]:
        values = inputs[name]
        if values.shape != shape:
            raise RequestError(f"{place}[{name!r}] has shape {values.shape}; it must be {shape}")
        if not np.isfinite(values).all():
            raise RequestError(f"{place}[{name!r}] holds a value that is not finite")


def check_tokens(tokens: np.ndarray, place: str, vocab_size: int) -> None:
    """Refuse an empty sequence, anything but whole numbers, and numbers that are no token."""
    if tokens.size == 0:
        raise RequestError(f"{place} is empty; give at least one token")
    if tokens.dtype.kind not in "iu":
        raise RequestError(f"{place} is {tokens.dtype}; tokens are whole numbers")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise RequestError(f"{place} holds token {wrong}; the vocabulary has 0 to {vocab_size - 1}")


def check_adam(params: AdamParams) -> None:
    """Refuse settings that AdamW has no meaning for."""
    for name, low, high in (
        ("learning_rate", 0.0, math.inf),
        ("beta1", 0.0, 1.0),
        ("beta2", 0.0, 1.0),
        ("eps", 0.0, math.inf),
        ("weight_decay", 0.0, math.inf),
        ("grad_clip_norm", 0.0, math.inf),
    ):
        value = getattr(params, name)
        if not low <= value < high:
            raise RequestError(f"{name} is {value}; it must be at least {low} and below {high}")
    if params.eps == 0:
        raise RequestError("eps is 0; a gradient of 0 would be divided by it: give 1e-12 or so")


def check_sample(request: SampleRequest, vocab_size: int, context_length: int) -> None:
    """Refuse a sampling request whose prompt, lengths or distribution settings make no sense."""
    check_tokens(request.prompt, "prompt", vocab_size)
    length, wanted = len(request.prompt), request.max_tokens
    if wanted is not None and wanted < 1:
        raise RequestError(f"max_tokens is {wanted}; give at least 1")
    if length + (wanted or 1) > context_length:
        raise RequestError(
            "Prompt length plus max_tokens exceeds the model's context window: "
            f"{length} + {wanted or 1} > {context_length}"
        )
    if request.num_samples < 1:
        raise RequestError(f"num_samples is {request.num_samples}; give at least 1")
    if not 0 <= request.temperature < math.inf:
        raise RequestError(f"temperature is {request.temperature}; give 0 (greedy) or more")
    if not 0 < request.top_p <= 1:
        raise RequestError(f"top_p is {request.top_p}; give more than 0, at most 1 (off)")
    if request.top_k < -1:
        raise RequestError(f"top_k is {request.top_k}; give -1 (off) or a number of tokens")
    if request.prompt_alt_tokens_k < 0:
        raise RequestError(f"prompt_alt_tokens_k is {request.prompt_alt_tokens_k}; give 0 or more")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(request, name) <= vocab_size:
            raise RequestError(f"{name} is {getattr(request, name)}; give 0 to {vocab_size}")
    check_stop(request.stop, vocab_size)
    check_target_prompt(request, vocab_size)


def check_stop(stop: str | list[str] | list[int] | None, vocab_size: int) -> None:
    """A stop is a non-empty string, a list of such strings, or a list of token ids."""
    stops = [stop] if isinstance(stop, str) else stop or []
    for item in stops:
        if isinstance(item, str) != isinstance(stops[0], str):
            raise RequestError("stop mixes strings and token ids; give one kind")
        if item == "":
            raise RequestError("stop holds an empty string, which would stop at once")
        if not isinstance(item, str) and not 0 <= item < vocab_size:
            raise RequestError(f"stop holds token {item}; the vocabulary has 0 to {vocab_size - 1}")


def check_target_prompt(request: SampleRequest, vocab_size: int) -> None:
    """target_prompt_logprobs asks for K tokens after each prompt token but the last."""
    targets = request.target_prompt_logprobs
    if targets is None:
        return
    rows = len(request.prompt) - 1
    if targets.ndim != 2 or targets.shape[0] != rows:
        raise RequestError(
            f"target_prompt_logprobs has shape {targets.shape}; it must be ({rows}, K)"
        )
    if targets.size and not -1 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise RequestError("target_prompt_logprobs holds a number that is neither a token nor -1")
