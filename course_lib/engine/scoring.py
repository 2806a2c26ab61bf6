"""What does the model say of these tokens? From rows of tokens to log p of each target token.

Two ways to the same numbers: `packed` for plain Llamas, `padded` for any other causal LM, through
peft's own layers. Rows are joined end to end: M positions in all, (M,) or with K targets (M, K).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.engine.adapter import Adapter
from course_lib.engine.autograd import HiddenStates, TargetLogprobs
from course_lib.engine.llama import Llama, Weights
from course_lib.engine.model import BaseModel
from course_lib.engine.packing import pack, shared_prefixes
from course_lib.engine.requests import TrainDatum

ACTIVATION_BYTES = 2 << 30  # what one micro-batch may keep for its backward pass


def micro_batches(base: BaseModel, data: list[TrainDatum]) -> list[list[int]]:
    """Cut rows into batches that fit the memory of a backward pass; rows of like shape together.

    The packed way wants rows side by side that begin alike, the padded one rows of equal length.
    """
    limit = ACTIVATION_BYTES // bytes_per_token(base)
    batches: list[list[int]] = []
    for columns in (1, 2):
        alike = [
            row
            for row, datum in enumerate(data)
            if datum.loss_fn_inputs["target_tokens"].ndim == columns
        ]
        if not alike:
            continue
        rows = [data[row].tokens for row in alike]
        if base.llama is None:
            cut = cut_padded([len(row) for row in rows], limit)
        else:
            cut = cut_packed(rows, limit)
        batches += [[alike[index] for index in batch] for batch in cut]
    return batches


def cut_padded(lengths: list[int], limit: int) -> list[list[int]]:
    """Rows in order of length, so many at a time that they fit when padded to the longest."""
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or (len(batches[-1]) + 1) * longest > limit:
            batches.append([])
            longest = lengths[row]
        batches[-1].append(row)
    return batches


def cut_packed(rows: list[np.ndarray], limit: int) -> list[list[int]]:
    """All rows at once if they fit, else group by group of a shared beginning, which counts once in
    each batch."""
    if sum(map(len, rows)) <= limit:
        return [list(range(len(rows)))]
    batches: list[list[int]] = []
    used = limit
    for shared, members in shared_prefixes(rows):
        used += shared
        for row in members:
            used += len(rows[row]) - shared
            if used > limit:
                batches.append([])
                used = len(rows[row])
            batches[-1].append(row)
    return batches


def bytes_per_token(base: BaseModel) -> int:
    """About what a backward pass keeps of one token: a decoder's activations and the logits."""
    config = base.config
    layer = 8 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 0)
    return 4 * (config.num_hidden_layers * layer + 3 * base.vocab_size)


def score(base: BaseModel, adapter: Adapter, batch: list[TrainDatum]) -> Tensor:
    """log p of every target token, rows end to end: (M,) or (M, K)."""
    rows = [datum.tokens for datum in batch]
    targets = flat([datum.loss_fn_inputs["target_tokens"] for datum in batch], base.device)
    columns = targets.reshape(len(targets), -1)  # (M, K)
    if base.llama is None:
        logprobs = padded(base.activate(adapter), rows, columns)
    else:
        weights = base.arranged(base.llama, adapter)
        logprobs = packed(base.llama, weights, rows, columns)
    return logprobs.reshape(targets.shape)


def packed(llama: Llama, weights: Weights, rows: list[np.ndarray], targets: Tensor) -> Tensor:
    """log p (M, K) by the fast forward pass."""
    layout = pack(rows, targets.device)
    hidden = HiddenStates.apply(llama, weights, layout, *weights.adapters)
    head = weights.head
    b = head.bs[0] if head.bs else None
    return TargetLogprobs.apply(hidden, head.weight, head.a, b, layout.source, targets)


def padded(model: torch.nn.Module, rows: list[np.ndarray], targets: Tensor) -> Tensor:
    """log p (M, K) by the model's own forward pass.

    Rows are padded on the right, so causal attention alone keeps the padding out of sight.
    """
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    real = torch.arange(tokens.shape[1]) < lengths.unsqueeze(-1)  # (B, N)
    tokens[real] = torch.from_numpy(np.concatenate(rows))
    logits = model(input_ids=tokens.to(targets.device), use_cache=False).logits  # (B, N, V)
    logits = logits[real.to(targets.device)].float()  # (M, V)
    return logits.gather(-1, targets) - logits.logsumexp(-1, keepdim=True)


def flat(rows: list[np.ndarray], device: torch.device) -> Tensor:
    """Rows joined end to end; where each position has several columns, filled up with zeros."""
    if rows[0].ndim == 2:
        width = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows]
    return torch.from_numpy(np.concatenate(rows)).to(device)
