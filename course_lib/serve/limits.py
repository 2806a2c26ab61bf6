"""How much may one caller ask for? The server's bounds in one place; a caller over them is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeLimits:
    """`context` and `vocabulary` come from the model; a test may shrink the others."""

    context: int = 1024  # tokens of prompt and answer together
    vocabulary: int = 1  # token ids
    choices: int = 16  # answers of one request
    in_flight: int = 512  # answers being made or waiting; beyond it 429
    body_bytes: int = 1 << 20  # one request body
