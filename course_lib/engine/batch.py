"""Which samples are decoded together? All that wait: they join the batch at the next token.

Calls wait in a queue per learner and are let in one learner after the other, so that a single call
does not stand behind another learner's thousand. Nor do those thousand fill the room for all: when
too many wait, only who has more than an equal share of them is sent away.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from course_lib.engine.answers import answer, reply_for, tried
from course_lib.engine.futures import FutureTable, Pending
from course_lib.engine.limits import Limits
from course_lib.engine.requests import RequestError, SampleRequest, SampleResult
from course_lib.engine.sampler import share_of
from course_lib.engine.trace import Trace
from course_lib.engine.wire import Reply, failure_reply


@dataclass
class SampleJob:
    """One accepted `sample` call. `weights` is asked for when the call joins the batch."""

    pending: Pending
    request: SampleRequest
    sampler: Any  # the base model's Sampler
    weights: Callable[[], Any]
    encode: Callable[[SampleResult], Reply]
    learner: str
    accepted_at: float = field(default_factory=time.time)


@dataclass
class Ended:
    """A learner's calls that are done and not answered yet."""

    first_at: float = field(default_factory=time.monotonic)
    jobs: list[tuple[SampleJob, Future[SampleResult]]] = field(default_factory=list)


class SampleQueue:
    """The calls that wait, from any thread, and those being decoded, on the compute thread."""

    def __init__(self, futures: FutureTable, limits: Limits, trace: Trace) -> None:
        self._futures, self._limits, self._trace = futures, limits, trace
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[SampleJob]] = OrderedDict()  # by learner
        self._waiting_samples = 0
        self._last_call = 0.0
        self._entering: SampleJob | None = None  # on its way from `_waiting` to `_decoding`
        self._decoding: dict[Future[SampleResult], SampleJob] = {}  # by ticket
        self._ended: dict[str, Ended] = {}  # by learner

    def add(self, job: SampleJob) -> bool:
        """Queue a call; False when so many wait that the client should come back later."""
        with self._lock:
            if self._too_many(job):
                return False
            job.pending.session = job.learner
            self._waiting_samples += job.request.num_samples
            self._waiting.setdefault(job.learner, deque()).append(job)
            self._last_call = time.monotonic()
        return True

    def _all_waiting(self) -> list[SampleJob]:
        """Whoever asks holds the lock."""
        return [job for queue in self._waiting.values() for job in queue]

    def _too_many(self, job: SampleJob) -> bool:
        """When all that wait are too many, those of this learner are, if they exceed its equal
        share. Who has none waiting is always let in."""
        count, limit = job.request.num_samples, self._limits.waiting_samples
        if self._waiting_samples + count <= limit or job.learner not in self._waiting:
            return False
        own = sum(other.request.num_samples for other in self._waiting[job.learner])
        return own + count > limit // len(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting or self._decoding)

    def decode(self, enough: Callable[[], bool], patient: bool) -> None:
        """Decode until nothing is left or it is enough; new calls join between tokens. With nothing
        else to do, the first calls may be waited for (`patient`)."""
        if patient and self._waiting and not self._decoding:
            self._gather()
        try:
            while True:
                self._admit()
                if not self._decoding:
                    return
                for sampler in dict.fromkeys(job.sampler for job in self._decoding.values()):
                    self._step(sampler)
                self._answer_due()
                if enough():
                    return
        finally:
            for learner in [*self._ended]:
                self._answer(learner)

    def close(self) -> list[SampleJob]:
        """Give back everything that has no answer, though the compute thread may still be at it: a
        call is in one of these places, or in two for a moment, until it is answered."""
        with self._lock:
            jobs = self._all_waiting()
            self._waiting.clear()
            jobs += [self._entering] if self._entering is not None else []
        jobs += [*self._decoding.values()]
        return jobs + [job for ended in [*self._ended.values()] for job, _ in [*ended.jobs]]

    def abandon(self, jobs: list[SampleJob], reply: Reply) -> None:
        """Answer these calls with a failure and take them out of the batch."""
        for job in jobs:
            self._futures.settle(job.pending, reply)
        self._decoding = {
            ticket: job for ticket, job in self._decoding.items() if job.pending.reply is None
        }

    def abandon_all(self, error: Exception) -> None:
        """After a mistake of our own: the calls in hand fail, the thread lives."""
        self.abandon([*self._decoding.values()], reply_for(error))

    def _gather(self) -> None:
        """Calls seldom come alone. Wait until the client has sent them all and asks for the
        answers: their prompts are computed together then, and do not compete with its work."""
        latest = time.monotonic() + self._limits.gather_s
        while (now := time.monotonic()) < latest:
            with self._lock:
                jobs = self._all_waiting()
            unasked = [job for job in jobs if not job.pending.asked]
            if unasked:  # the newest is asked for last: mostly a single wait
                unasked[-1].pending.wait_until_asked(latest - now)
            elif now < self._last_call + self._limits.pause_s:
                time.sleep(min(latest, self._last_call + self._limits.pause_s) - now)
            else:
                return

    def _admit(self) -> None:
        """Let waiting calls join the batch, one per learner in turn, while there is room."""
        # One call takes its share of the rows at a time, however many samples it asks for.
        share = share_of(self._limits.active_sequences)
        room = self._limits.active_sequences - sum(
            min(job.request.num_samples, share) for job in self._decoding.values()
        )
        while True:
            with self._lock:
                if not self._waiting or (room <= 0 and self._decoding):
                    return
                learner, queue = self._waiting.popitem(last=False)
                job = self._entering = queue.popleft()
                self._waiting_samples -= job.request.num_samples
                if queue:
                    self._waiting[learner] = queue  # at the end: the next learner comes first
            room -= min(job.request.num_samples, share)
            if not job.pending.cancelled:
                self._begin(job)
            else:
                self._futures.settle(job.pending, failure_reply("The sample call was cancelled"))
            self._entering = None

    def _begin(self, job: SampleJob) -> None:
        try:
            ticket = job.sampler.submit(job.request, job.weights())
        except Exception as error:
            self._futures.settle(job.pending, reply_for(error))
        else:
            self._decoding[ticket] = job
            ticket.add_done_callback(self._end)

    def _step(self, sampler: Any) -> None:
        try:
            sampler.step()
        except Exception as error:
            jobs = [job for job in self._decoding.values() if job.sampler is sampler]
            self.abandon(jobs, reply_for(error))
            tried(sampler.reset)

    def _end(self, ticket: Future[SampleResult]) -> None:
        """Take out a call whose sequences are all finished."""
        job = self._decoding.get(ticket)
        if job is not None:  # not abandoned
            self._ended.setdefault(job.learner, Ended()).jobs.append((job, ticket))
            del self._decoding[ticket]

    def _answer_due(self) -> None:
        """Answer a learner's calls that have ended, several at a time: a client that reads answers
        and a decoding step slow each other down."""
        if not self._ended:
            return
        decoding = {job.learner for job in self._decoding.values()}
        latest = time.monotonic() - self._limits.together_s
        for learner, ended in [*self._ended.items()]:
            if learner not in decoding or ended.first_at <= latest:
                self._answer(learner)

    def _answer(self, learner: str) -> None:
        for job, ticket in self._ended[learner].jobs:
            self._trace.add(f"{learner}:sample", "sample", job.accepted_at)
            self._futures.settle(job.pending, answer(partial(encoded, job, ticket)))
        del self._ended[learner]


def encoded(job: SampleJob, ticket: Future[SampleResult]) -> Reply:
    """The encoded result of a call whose ticket is done."""
    try:
        return job.encode(ticket.result())
    except CancelledError as error:
        raise RequestError("The sample call was cancelled") from error
