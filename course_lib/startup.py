"""Why is starting slow? Half of the answer is imports; a good part of those is looking for garbage.

Importing tinker, torch and transformers makes about a million objects that live as long as the
process. Python's collector visits them again and again: while they are made (0.8 of 3.5 seconds of
`connect()` on the machine of the README), later in every full collection, and once more at exit.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_collecting() -> Iterator[None]:
    """Import large packages in one go; what is there afterwards is never looked at again.

    That would keep garbage, too: it goes first, where earlier packages need not be searched for it.
    """
    was_on = gc.isenabled()
    if gc.get_freeze_count():
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Where a session outlives it, Interrupt waits until these imports are done: torch cannot be
    imported again in a process in which its import was interrupted. A command just ends.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    outlives = "IPython" in sys.modules or hasattr(sys, "ps1")
    on_main = threading.current_thread() is threading.main_thread()  # the others get no signals
    if not (outlives and on_main and callable(interrupt)):
        yield
        return
    asked: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *call: asked.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        if asked:
            interrupt(*asked[0])


def collect_all() -> None:
    """Free garbage wherever it is, among the packages as well: half a second or more."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
