"""Where do random numbers come from that nobody may guess or repeat? Seeded by the system once.

Asking the system each time takes a microsecond, but lets go of Python's lock, and getting it back
from a busy client takes longer: without it 64 `sample` calls need up to a tenth less time.
"""

from __future__ import annotations

import random
import secrets

_source = random.Random(secrets.randbits(256))


def random_bits(count: int) -> int:
    """A whole number of so many random bits; not for keys, which `secrets` makes."""
    return _source.getrandbits(count)
