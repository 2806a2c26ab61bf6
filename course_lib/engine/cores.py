"""How many cores should a piece of work use? All of them while they answer at once, else one.

OpenMP's threads wait for the next operation awake, but only while a process has no more of them
than the machine has cores. A second thread that computes (a cell with torch in it) brings its own,
and from then on all sleep between operations: waking them takes longer than a small operation. The
same happens where other programs keep the cores busy. So the engine's models are loaded in a thread
that ends and takes its helpers along (`apart`), and before work begins a short operation is timed
both ways (`cores_answer`).

With a 0.9 M model on two cores, one core against both: 64 samples of 40 tokens 164 ms against 97,
the gradient of 32 short rows 50 against 29; when helpers slept, the second core was no help.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")

LARGE = 1e9  # parameters x tokens of a forward pass from which on all cores pay in any case
ASK_AGAIN_S = {True: 1.0, False: 0.1}  # a no may have been a moment's: the SDK computes, too
ASKED_WITH = 65_536  # exponentials: two of the pieces that torch cuts such work into
ASKED_TIMES = 7

_asked = threading.local()  # each thread has helpers of its own


@contextmanager
def cores_for(parameters: int, tokens: int) -> Iterator[None]:
    """Let torch use all the cores that it may, or one where the others would be waited for."""
    allowed = torch.get_num_threads()
    if allowed == 1 or parameters * tokens >= LARGE or cores_answer():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(allowed)


def cores_answer() -> bool:
    """Is a short operation faster on all cores than on one? Asked again after a while."""
    now = time.monotonic()
    if now >= getattr(_asked, "until", 0.0):
        allowed = torch.get_num_threads()
        on_all = short_operation_s()
        torch.set_num_threads(1)
        try:
            _asked.answer = on_all < short_operation_s()
        finally:
            torch.set_num_threads(allowed)
        _asked.until = now + ASK_AGAIN_S[_asked.answer]
    return _asked.answer


def short_operation_s() -> float:
    """Least seconds of an operation that is just long enough to be shared.

    On two cores: 42 microseconds on one, 26 on both, 57 on both when the second was asleep. The
    least, since the others also wait for Python's lock: milliseconds where the SDK is busy.
    """
    numbers, results, times = torch.zeros(ASKED_WITH), torch.empty(ASKED_WITH), []
    for _ in range(ASKED_TIMES):
        began = time.perf_counter()
        torch.exp(numbers, out=results)
        times.append(time.perf_counter() - began)
    return min(times)


def apart(function: Callable[..., Result], *args: object) -> Result:
    """Call the function in a thread that ends with it, so that no helper of its torch is left."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, thread_name_prefix="engine-load") as thread:
        return thread.submit(function, *args).result()
