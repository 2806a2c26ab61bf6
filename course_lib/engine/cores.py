"""How many cores should a piece of work use? All of them while they answer at once, else one.

OpenMP's threads wait for the next operation awake, but only while a process has no more of them
than the machine has cores. A second thread that computes (a cell with torch in it) brings its own,
and from then on all sleep between operations: waking them takes longer than a small operation. So
the engine's models are loaded in a thread that ends and takes its helpers along (`apart`), and
before work begins a short operation is timed both ways (`cores_answer`).

Where other programs want the cores, too, every operation waits for whichever thread they have just
put aside. That shows in the processor time that work on all cores was given (`Cores.at_work`).

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

# Parameters x tokens of a forward pass from which on all cores pay in any case:
LARGE = 1e9  # though helpers sleep
HUGE = 1e11  # though others want them: an operation takes longer than a turn of theirs
ASK_AGAIN_S = {True: 1.0, False: 0.1}  # a no may have been a moment's: the SDK computes, too
ASKED_WITH = 65_536  # exponentials: two of the pieces that torch cuts such work into
ASKED_TIMES = 7
FAIR = 0.6  # of all cores' time; helpers that wait awake use it up, too
LOOK_S = 0.1  # of work on all cores
TRIAL_S = 0.02
ALONE_S = (0.5, 8.0)  # on one core at first, and at most, until all are tried again


class Cores(threading.local):
    """What a thread has seen of the cores; each has helpers of its own."""

    answer_until = 0.0
    answer = True
    wall_s, cpu_s = 0.0, 0.0  # of work on all cores since the last look
    alone_until: float | None = None  # while others have the cores
    alone_s = ALONE_S[0]

    @contextmanager
    def at_work(self, allowed: int) -> Iterator[None]:
        """What is done inside is done on all cores: note what time they were given."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - wall_s
        self.cpu_s += time.process_time() - cpu_s
        if self.wall_s >= LOOK_S:
            self._look(allowed)

    def _look(self, allowed: int) -> None:
        if self.cpu_s < FAIR * allowed * self.wall_s:
            self.alone_until = time.monotonic() + self.alone_s
            self.alone_s = min(2 * self.alone_s, ALONE_S[1])
        else:
            self.alone_s = ALONE_S[0]
        self.wall_s = self.cpu_s = 0.0

    def taken(self) -> bool:
        """Do others have the cores? Tried again after a while, by a short trial of all."""
        now = time.monotonic()
        if self.alone_until is not None and now >= self.alone_until:
            fair = trial_share() >= FAIR
            self.alone_until = None if fair else time.monotonic() + self.alone_s
        return self.alone_until is not None


seen = Cores()


@contextmanager
def cores_for(parameters: int, tokens: int) -> Iterator[None]:
    """Let torch use all the cores that it may, or one where the others would be waited for.

    Folding an adapter of rank r into the weights is as much work as a forward pass of r tokens.
    """
    allowed, size = torch.get_num_threads(), parameters * tokens
    if allowed == 1 or size >= HUGE:
        yield
    elif seen.taken() or (size < LARGE and not cores_answer()):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(allowed)
    else:
        with seen.at_work(allowed):
            yield


def cores_answer() -> bool:
    """Is a short operation faster on all cores than on one? Asked again after a while."""
    now = time.monotonic()
    if now >= seen.answer_until:
        allowed = torch.get_num_threads()
        with seen.at_work(allowed):
            on_all = short_operation_s()
        torch.set_num_threads(1)
        try:
            seen.answer = on_all < short_operation_s()
        finally:
            torch.set_num_threads(allowed)
        seen.answer_until = now + ASK_AGAIN_S[seen.answer]
    return seen.answer


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


def trial_share() -> float:
    """The share of all cores' time that short operations on all of them are given."""
    numbers, results = torch.zeros(ASKED_WITH), torch.empty(ASKED_WITH)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    while (took_s := time.perf_counter() - wall_s) < TRIAL_S:
        torch.exp(numbers, out=results)
    return (time.process_time() - cpu_s) / (took_s * torch.get_num_threads())


def apart(function: Callable[..., Result], *args: object) -> Result:
    """Call the function in a thread that ends with it, so that no helper of its torch is left."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, thread_name_prefix="engine-load") as thread:
        return thread.submit(function, *args).result()
