"""How much arithmetic is in a step, and how much does this machine do? The share of its peak.

Only what every contender must do is counted, and only for real tokens: the products with the
matrices forward (2 operations a weight and token) and back to the activations (2 more), the
gradients of A and B, the head where a token is trained or sampled, causal attention. A prompt is
counted once, however many samples it has. Padding, repeated prompts and adapters computed apart are
not work.
"""

from __future__ import annotations

import time

from models import RANK, SHAPES, SHIPPED


def shape_of(model: str) -> dict[str, int]:
    if model in SHAPES:
        return SHAPES[model]
    import json

    return json.loads((SHIPPED / "config.json").read_text())


def weights(model: str) -> tuple[int, int, int, int]:
    """Weights of the layers' matrices, of the head, of the adapters; width of all attention."""
    shape = shape_of(model)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    matrices = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    layers = shape["num_hidden_layers"]
    plain = layers * sum(a * b for a, b in matrices)
    adapters = layers * sum(RANK * (a + b) for a, b in matrices)
    return plain, hidden * shape["vocab_size"], adapters, layers * hidden


def train_flops(model: str, tokens: float, trained: float, length: float) -> float:
    """One step on `tokens` in rows of `length`, of which `trained` have a loss."""
    plain, head, adapters, width = weights(model)
    attention = 6 * tokens * length * width  # 2 products forward and 4 back, half of each masked
    return 4 * tokens * (plain + adapters) + 4 * trained * head + attention


def sample_flops(model: str, prompt_tokens: float, new_tokens: float, length: float) -> float:
    """Prompts of `prompt_tokens` in all, then `new_tokens` in all, each seeing about `length`."""
    plain, head, _, width = weights(model)
    read = 2 * prompt_tokens * plain + prompt_tokens * length * 2 * width
    return read + new_tokens * (2 * (plain + head) + 4 * length * width)


def matrix_peak() -> float:
    """The best of several square products in float32, on all cores: operations a second."""
    import torch

    best = 0.0
    for size in (1024, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(8):
            began = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
