"""In which order? One `Line` per training run keeps its requests in the client's order.

The client numbers its requests 1, 2, 3 ..., but they need not arrive so: the SDK sends the first
chunk of a large batch last, and sends a request again when the reply was lost. A number may also
never arrive, because its request was refused at the door; the line then waits a while and goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from course_lib.engine.futures import Pending
from course_lib.engine.wire import Reply

_PATIENCE = 6  # gaps for which a missing one is waited for while others arrive: a slow upload
_REMEMBERED = 2048  # sequence ids whose re-sending is recognised


@dataclass
class Job:
    """One accepted request and the work that answers it."""

    pending: Pending
    work: Callable[[], Reply]
    what: str  # the request's name, for the trace
    run_id: str


class Line:
    """The training requests of one run. Guarded by the worker's lock."""

    def __init__(self, learner: str) -> None:
        self.learner = learner  # the session: turns are fair between learners, then between runs
        self.last_turn = 0
        self.next_seq = 0
        self._held: dict[int, Job] = {}
        self._known: OrderedDict[int, str] = OrderedDict()
        self._waiting_since: float | None = None  # for the missing number
        self._quiet_since: float | None = None  # has nothing arrived

    def known(self, seq_id: int) -> str | None:
        """The request id under which this sequence id was accepted before."""
        return self._known.get(seq_id)

    def add(self, seq_id: int, job: Job) -> None:
        """Accept a request; the caller has checked that its sequence id is new."""
        self._known[seq_id] = job.pending.request_id
        self._held[seq_id] = job
        self._quiet_since = None  # while requests arrive, the missing one may still come
        while len(self._known) > _REMEMBERED + len(self._held):
            self._known.popitem(last=False)

    def __len__(self) -> int:
        return len(self._held)

    def ready(self, now: float, gap_s: float) -> bool:
        """Whether the next request can run, giving up a missing sequence id when the run was quiet
        for `gap_s`; a client that never pauses would wait for ever, so also after some gaps."""
        if not self._held:
            return False
        if self.next_seq in self._held:
            return True
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        self._quiet_since = now if self._quiet_since is None else self._quiet_since
        if now - self._quiet_since < gap_s and now - self._waiting_since < _PATIENCE * gap_s:
            return False
        self.next_seq = min(self._held)
        return True

    def take(self) -> Job:
        """Hand out the next request; `ready` has said that there is one."""
        job = self._held.pop(self.next_seq)
        self.next_seq += 1
        self._waiting_since = self._quiet_since = None
        return job

    def close(self) -> list[Job]:
        """Give back the requests that will not run."""
        jobs, self._held = list(self._held.values()), {}
        return jobs
