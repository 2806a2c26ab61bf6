"""How many cores should a piece of work use? One, unless the work is large.

An operation on several cores ends when the last of them does. Beside the compute thread this
process answers HTTP, runs the learner's cell and draws, so a short operation often waits for a core
longer than that core saves. With the shipped model on two cores, one core against both, through the
SDK: 8 samples of 40 tokens 28 ms against 98, 128 samples 242 against 307, a training step of 270
tokens 31 against 46, but one of 1,221 tokens 102 against 90.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LARGE = 1e9  # parameters x tokens of a forward pass from which on all cores pay


@contextmanager
def cores_for(parameters: int, tokens: int) -> Iterator[None]:
    """Let torch use one core for a small piece of work, and for a large one all that it may."""
    allowed = torch.get_num_threads()
    if allowed == 1 or parameters * tokens >= LARGE:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(allowed)
