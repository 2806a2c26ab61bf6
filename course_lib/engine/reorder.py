"""In which order does a weight lie best? For training as it is, for sampling in oneDNN's.

torch multiplies with MKL, which arranges a matrix anew for every product. Where only a few rows are
multiplied, as in decoding, that takes longer than the product itself: 350 microseconds for 4 rows
and 576 x 3072 weights, on two cores. oneDNN, which torch brings along, needs 90 once it has
arranged the weights for itself. These are the operations that torch.compile uses; where they are
missing, or give something else, weights stay as they are.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

LARGE = 48_000  # numbers in a weight; smaller ones gain nothing
ROOM = 2 << 30  # bytes of a model's weights that may lie in memory a second time
# It costs what it saves in 50 (135 M) to 400 (0.9 M) tokens, and much later while the second core
# sleeps. Whoever has used weights for so many will mostly use them for as many again.
REORDER_AT = 1400  # tokens
A_PASS = 20  # as many as each pass over the weights counts for, beside its own
ROWS = 64  # that the order is made for; others may use it
WORTH = 3e6  # (rows + 4) x numbers from which on a product gains


def reordered(weight: Tensor) -> Tensor | None:
    """The same weight (out, in) in oneDNN's order; None where that is no help."""
    if weight.numel() < LARGE or weight.device.type != "cpu" or not works():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def worth_it(x: Tensor, weight: Tensor) -> bool:
    """Is this product faster with the reordered weight?"""
    return (len(x) + 4) * weight.numel() >= WORTH


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, in) times the reordered weight's transpose: (B, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def product_added(to: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """to + x W^T, in one pass."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, to, weight, None, "add")


@functools.cache
def works() -> bool:
    """Is oneDNN there, for a processor that it knows well, and does it agree?"""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with torch.inference_mode():
        x, to = torch.linspace(-1, 1, 3 * 64).view(3, 64), torch.ones(3, 32)
        weight = torch.linspace(1, -2, 32 * 64).view(32, 64)
        try:
            own = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            given = [product(x, own), product_added(to, x, own)]
        except (AttributeError, RuntimeError, NotImplementedError):
            return False
        expected = [x @ weight.T, to + x @ weight.T]
        return all(map(functools.partial(torch.allclose, rtol=1e-4, atol=1e-4), given, expected))
