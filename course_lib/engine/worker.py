"""Who does the work, and in which order? One thread computes; everything else only waits.

A round of the loop runs one training request - of the learner whose last turn is longest ago - and
then gives sampling as much time as that took. All `sample` calls that are waiting join the batch
being decoded, at the next token. No exception ends the loop: it becomes the answer of the request.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from course_lib.engine.answers import answer, tried
from course_lib.engine.batch import SampleJob, SampleQueue
from course_lib.engine.futures import FutureTable
from course_lib.engine.limits import Limits
from course_lib.engine.trace import Trace
from course_lib.engine.turns import Job, Line
from course_lib.engine.wire import Reply, failure_reply

GO_ON = "create_training_client_from_state goes on from a checkpoint"
STOPPED = (
    "The engine was stopped before it had answered this request; start it again, by connect() or "
    f"`posttrain engine`, and send the request anew. {GO_ON}"
)


class Worker:
    """The compute thread with its queues. Public methods may be called from any thread."""

    def __init__(self, futures: FutureTable, limits: Limits) -> None:
        self._futures, self._limits = futures, limits
        self._wake = threading.Condition()
        self._lines: dict[str, Line] = {}
        self._errands: deque[Callable[[], None]] = deque()
        self._spare: Callable[[], None] | None = None
        self.trace = Trace()
        self._samples = SampleQueue(futures, limits, self.trace)
        self._turn = 0
        self._stopping = False
        self._job: Job | None = None  # the request being computed, from when it leaves its line on
        self._thread = threading.Thread(target=self._loop, name="engine-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End after the request being computed, or when its time is up, while its thread may go on;
        what has no answer by then is answered with a sentence."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        with self._wake:
            jobs = [job for line in self._lines.values() for job in line.close()]
            jobs += [self._job] if self._job is not None else []
        for job in [*jobs, *self._samples.close()]:
            self._futures.settle(job.pending, failure_reply(STOPPED, "server"))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # What the HTTP side calls -------------------------------------------------------------------

    def open_line(self, run_id: str, learner: str) -> Line:
        """The run's line, made when it is new."""
        with self._wake:
            return self._lines.setdefault(run_id, Line(learner))

    def submit(
        self, run_id: str, seq_id: int, owner: str, what: str, work: Callable[[], Reply]
    ) -> str:
        """Put a training request in its run's line; the same sequence id gives the same answer.

        Never refuses: a request that cannot run becomes a failed future, since the client has
        already counted its sequence id.
        """
        with self._wake:
            line = self._lines.get(run_id)
            known = line.known(seq_id) if line is not None else None
            if known is not None:
                return known
            job = Job(self._futures.open(owner), work, what, run_id)
            problem = self._problem(line, seq_id)
            if line is not None:
                job.pending.session = line.learner
            if problem is None and line is not None:
                line.add(seq_id, job)
                self._wake.notify()
        if problem is not None:
            self._futures.settle(job.pending, failure_reply(problem))
        return job.pending.request_id

    def _problem(self, line: Line | None, seq_id: int) -> str | None:
        if self._stopping:
            return STOPPED
        if line is None:
            return f"The training run is unknown here; it may have ended with its session. {GO_ON}"
        if seq_id < line.next_seq:
            return f"The sequence id {seq_id} is over; its turn was given up or long finished"
        if len(line) >= self._limits.held_requests:
            return f"More than {self._limits.held_requests} requests of this run are waiting"
        return None

    def fail(self, owner: str, refuse: Callable[[], Reply]) -> str:
        """A future that has failed already, with the sentence that `refuse` raises."""
        pending = self._futures.open(owner)
        self._futures.settle(pending, answer(refuse))
        return pending.request_id

    def close_line(self, run_id: str, reason: str) -> None:
        """End a run's line; requests that still wait fail, with the reason ("its ... has ...")."""
        with self._wake:
            line = self._lines.pop(run_id, None)
            jobs = line.close() if line is not None else []
        for job in jobs:
            sentence = (
                f"This {job.what} of the training run {run_id} was still waiting when the run was "
                f"closed: {reason}. Connect again; {GO_ON}"
            )
            self._futures.settle(job.pending, failure_reply(sentence))

    def submit_sample(self, job: SampleJob) -> bool:
        """Queue a `sample` call; False when so many wait that the client should come back later."""
        accepted = self._samples.add(job)
        with self._wake:
            stopping = self._stopping
            self._wake.notify()
        if stopping:  # it may have come after the last look at what waits
            self._futures.settle(job.pending, failure_reply(STOPPED, "server"))
        return accepted or stopping

    def errand(self, work: Callable[[], None]) -> None:
        """Run something small on the compute thread, which alone may touch adapters."""
        with self._wake:
            self._errands.append(work)
            self._wake.notify()

    def if_idle(self, work: Callable[[], None]) -> None:
        """Do something ahead of time, on the compute thread, unless requests wait by then."""
        with self._wake:
            self._spare = work
            self._wake.notify()

    # The compute thread -------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._stopping and not self._has_work() and self._spare is None:
                    held = any(len(line) for line in self._lines.values())
                    self._wake.wait(min(0.5, self._limits.gap_s) if held else 60)
                if self._stopping:
                    return
                if self._spare is not None and not self._has_work():
                    self._errands.append(self._spare)
                errands, self._errands, self._spare = list(self._errands), deque(), None
                job = self._next_job()
            for work in errands:
                tried(work)
            started = time.monotonic()
            if job is not None:
                self._run(job)
            seconds = max(time.monotonic() - started, self._limits.sample_slice_s)
            self._decode(seconds, patient=job is None)

    def _decode(self, seconds: float, patient: bool) -> None:
        """Sample for a while; without training that waits, until nothing is left to sample."""
        deadline = time.monotonic() + seconds

        def enough() -> bool:
            with self._wake:
                if self._stopping or self._errands:
                    return True
                return time.monotonic() >= deadline and bool(self._ready_lines())

        try:
            self._samples.decode(enough, patient)
        except Exception as error:
            self._samples.abandon_all(error)

    def _has_work(self) -> bool:
        return bool(self._errands or self._samples or self._ready_lines())

    def _ready_lines(self) -> list[Line]:
        now, gap_s = time.monotonic(), self._limits.gap_s
        return [line for line in self._lines.values() if line.ready(now, gap_s)]

    def _next_job(self) -> Job | None:
        """The next request of the learner, and of its runs the run, whose turn is longest ago."""
        lines = self._ready_lines()
        if not lines:
            return None
        latest: dict[str, int] = {}
        for line in self._lines.values():
            latest[line.learner] = max(latest.get(line.learner, 0), line.last_turn)
        line = min(lines, key=lambda line: (latest[line.learner], line.last_turn))
        self._turn += 1
        line.last_turn = self._turn
        self._job = line.take()
        return self._job

    def _run(self, job: Job) -> None:
        started = time.time()
        reply = answer(job.work)
        self.trace.add(job.run_id, job.what, started)
        self._futures.settle(job.pending, reply)
        self._job = None
