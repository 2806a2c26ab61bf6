"""Runs that were really broken, kept as their metrics: the patients of the clinic lesson.

Each is a file of data/recordings, made by the command that stands in its first line. Nothing here
trains; `data/experiments/broken_runs.py` did.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from course_lib.config import find_file
from course_lib.diagnosis import RULES

KINDS = tuple(rule.__name__ for rule in RULES)
HEALTHY = "healthy"
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Recording:
    """One run's metrics, what was done to it, and the command that does it again."""

    kind: str
    how: str
    command: str
    rows: list[dict[str, Any]]  # one per step


def recording(kind: str) -> Recording:
    """The recording of one of `KINDS`, or of `HEALTHY`."""
    text = find_file(f"data/recordings/{kind}.jsonl").read_text(encoding="utf-8")
    label, *rows = [json.loads(line) for line in text.splitlines()]
    return Recording(label["recording"], label["how"], label["command"], rows)


def ward(seed: int | str) -> dict[str, Recording]:
    """The eight broken runs in an order that gives nothing away: letter -> recording."""
    kinds = random.Random(f"ward/{seed}").sample(KINDS, len(KINDS))
    return {letter: recording(kind) for letter, kind in zip(LETTERS, kinds, strict=True)}
