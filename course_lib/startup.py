"""Why is starting slow? Half of the answer is imports; a good part of those is looking for garbage.

Importing tinker, torch and transformers makes about a million objects that live as long as the
process. Python's collector visits them again and again: while they are made (0.8 of 3.5 seconds of
`connect()` on the machine of the README), later in every full collection, and once more at exit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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


def collect_all() -> None:
    """Free garbage wherever it is, among the packages as well: half a second or more."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
