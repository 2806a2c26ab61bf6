"""What did the model think of the prompt itself? Log-probabilities at each position."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.engine.picking import Drawing, top_entries, uniforms
from course_lib.engine.requests import SampleRequest, SampleResult

ALTERNATIVES = 1 << 32  # their draws come from here on in the stream of the request's seed


def asks_about_prompt(request: SampleRequest) -> bool:
    """Does the answer need the logits at every prompt position?"""
    return bool(
        request.prompt_logprobs
        or request.topk_prompt_logprobs
        or request.target_prompt_logprobs is not None
        or request.prompt_alt_tokens_k
    )


@torch.inference_mode()
def describe_prompt(
    result: SampleResult, request: SampleRequest, logits: Tensor, seed: int
) -> None:
    """Fill in what the request asks about its prompt, from the logits (P, V) at its positions.

    Row i of what follows speaks of prompt token i + 1: nothing precedes token 0.
    """
    logprobs = torch.log_softmax(logits[:-1].float(), dim=-1)  # (P - 1, V)
    scored = len(logprobs)
    if request.prompt_logprobs_last_n is not None:
        scored = min(scored, request.prompt_logprobs_last_n)
    skipped = len(logprobs) - scored
    if request.prompt_logprobs:
        following = torch.from_numpy(request.prompt[1:]).to(logprobs.device).unsqueeze(-1)
        values = logprobs.gather(-1, following).squeeze(-1).cpu().numpy()
        values[:skipped] = np.nan
        result.prompt_logprobs = np.concatenate([np.full(1, np.nan, np.float32), values])
    if request.topk_prompt_logprobs:
        entries = top_entries(logprobs[skipped:], request.topk_prompt_logprobs)
        result.topk_prompt = [[] for _ in range(skipped + 1)] + entries
    if request.target_prompt_logprobs is not None:
        targets = torch.from_numpy(request.target_prompt_logprobs).to(logprobs.device)
        values = logprobs.gather(-1, targets.clamp(min=0))
        result.target_prompt = torch.where(targets < 0, 0.0, values).cpu().numpy()
    if request.prompt_alt_tokens_k:
        result.alt_tokens = alternatives(logits[:-1], logprobs, request, seed)


def alternatives(
    logits: Tensor, logprobs: Tensor, request: SampleRequest, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """k tokens for each position, drawn at the request's temperature; logprobs at temperature 1."""
    rows, k = len(logits), request.prompt_alt_tokens_k
    how = Drawing.of(
        [request.temperature] * rows, [request.top_k] * rows, [request.top_p] * rows, logits.device
    )
    seeds = np.full((rows, 1), seed, dtype=np.int64).view(np.uint64)
    counts = np.ascontiguousarray(ALTERNATIVES + np.arange(rows * k).reshape(k, rows).T)
    tokens = how.pick(logits, how.probs(logits), uniforms(seeds, counts))  # (P - 1, k)
    return tokens.cpu().numpy(), logprobs.gather(-1, tokens).cpu().numpy()
