"""The compute thread and its queues: order, fairness, and no way to make it hang or die."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
from fake_compute import FakeBase, FakeSampler

from course_lib.engine import turns
from course_lib.engine.batch import SampleJob
from course_lib.engine.futures import FutureTable, Pending
from course_lib.engine.limits import Limits
from course_lib.engine.requests import RequestError, SampleRequest
from course_lib.engine.turns import Job, Line
from course_lib.engine.wire import Reply, failure_reply
from course_lib.engine.worker import Worker

LIMITS = Limits(
    gap_s=0.3, waiting_samples=20, active_sequences=8, sample_slice_s=0.01, together_s=0
)


class Bench:
    """A worker with its future table, and a record of what ran."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.futures = FutureTable(limits)
        self.worker = Worker(self.futures, limits)
        self.ran: list[str] = []

    def send(self, run: str, seq: int, work: Callable[[], Reply] | None = None) -> str:
        work = work or partial(self.note, f"{run}{seq}")
        return self.worker.submit(run, seq, "me", "work", work)

    def note(self, text: str) -> Reply:
        self.ran.append(text)
        return Reply(text.encode())

    def result(self, request_id: str, timeout_s: float = 5.0) -> str:
        pending = self.futures.find(request_id, "me")
        assert pending is not None
        return reply_of(pending, timeout_s)

    def sample(
        self, sampler: FakeSampler, learner: str = "a", max_tokens: int = 2, samples: int = 1
    ) -> SampleJob | None:
        pending = self.futures.open("me", (learner, 0))
        request = SampleRequest(
            np.array([1]),
            num_samples=samples,
            max_tokens=max_tokens,
            cancelled=lambda: pending.cancelled,
        )
        job = SampleJob(pending, request, sampler, lambda: 0.0, lambda r: Reply(b"done"), learner)
        return job if self.worker.submit_sample(job) else None


def reply_of(pending: Pending, timeout_s: float = 5.0) -> str:
    there = threading.Event()
    pending.when_settled(there.set)
    if not there.wait(timeout_s):
        raise TimeoutError
    assert pending.reply is not None
    return pending.reply.body.decode()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.worker.open_line("a", "learner-1")
    bench.worker.open_line("b", "learner-2")
    yield bench
    bench.worker.stop()


def test_requests_run_in_the_order_of_their_numbers_not_of_their_arrival(bench: Bench):
    """The SDK sends the first chunk of a large batch last: seen as 2, 3, 4, 5, 1."""
    bench.worker.start()
    ids = [bench.send("a", seq) for seq in (0, 2, 3, 4, 5, 1)]
    assert [bench.result(i) for i in ids] == ["a0", "a2", "a3", "a4", "a5", "a1"]
    assert bench.ran == ["a0", "a1", "a2", "a3", "a4", "a5"]


def test_a_request_sent_again_runs_once(bench: Bench):
    bench.worker.start()
    first = bench.send("a", 0)
    assert bench.result(first) == "a0"
    assert bench.send("a", 0) == first
    assert bench.ran == ["a0"]


def test_a_number_that_never_arrives_does_not_hang_the_run(bench: Bench):
    bench.worker.start()
    bench.send("a", 0)
    held = bench.send("a", 2)
    started = time.monotonic()
    assert bench.result(held) == "a2"
    assert 0.25 < time.monotonic() - started < 3
    late = bench.send("a", 1)
    assert "sequence id 1 is over" in bench.result(late)
    assert bench.result(bench.send("a", 3)) == "a3"


def test_while_chunks_arrive_the_missing_one_is_waited_for():
    """Chunk 1 of a slow upload came after the gap's time and was refused."""
    bench = Bench(Limits(gap_s=0.4))
    bench.worker.open_line("a", "x")
    bench.worker.start()
    bench.send("a", 0)
    for seq in (2, 3, 4, 5):
        bench.send("a", seq)
        time.sleep(0.25)
    bench.result(bench.send("a", 1))
    bench.worker.stop()
    assert bench.ran == ["a0", "a1", "a2", "a3", "a4", "a5"]


def test_a_number_that_never_arrives_is_given_up_though_its_client_goes_on():
    """Each new request began the wait anew: a client that sent one every few seconds hung."""
    line, now = Line("x"), 0.0
    job = Job(Pending("me"), lambda: Reply(b""), "work", "a")
    for seq in range(1, 100):
        line.add(seq, job)
        if line.ready(now, gap_s=2.0):
            break
        now += 0.5
    assert now == 12.0 and line.take() is job
    assert line.ready(now, gap_s=2.0)  # those behind it are not waited for again


def test_the_wait_for_a_second_missing_number_begins_anew():
    line = Line("x")
    job = Job(Pending("me"), lambda: Reply(b""), "work", "a")
    line.add(1, job)
    assert not line.ready(0.0, gap_s=1.0) and line.ready(1.0, gap_s=1.0)
    line.take()
    assert not line.ready(1.0, gap_s=1.0)
    line.add(3, job)
    assert not line.ready(8.0, gap_s=1.0) and not line.ready(8.9, gap_s=1.0)
    assert line.ready(9.0, gap_s=1.0)


def test_the_last_requests_and_all_that_are_held_are_recognised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "_REMEMBERED", 2)
    line = Line("x")
    jobs = [Job(Pending("me"), lambda: Reply(b""), "work", "a") for _ in range(6)]
    for seq, job in enumerate(jobs):
        line.add(seq, job)
        if seq < 4:
            assert line.ready(0.0, gap_s=1.0) and line.take() is job
    found = [seq for seq in range(6) if line.known(seq) == jobs[seq].pending.request_id]
    assert found == [2, 3, 4, 5]
    for seq in range(6, 60):
        line.add(seq, jobs[0])
    assert line.known(2) and line.known(59)  # two remembered, and 56 that wait


def test_turns_are_fair_between_learners(bench: Bench):
    ids = [bench.send("a", seq) for seq in range(4)] + [bench.send("b", seq) for seq in range(4)]
    bench.worker.start()
    for request_id in ids:
        bench.result(request_id)
    assert bench.ran == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_a_learner_with_two_runs_gets_no_more_turns_than_one_with_one(bench: Bench):
    bench.worker.open_line("c", "learner-1")
    ids = [bench.send(run, seq) for run in "abc" for seq in range(2)]
    bench.worker.start()
    for request_id in ids:
        bench.result(request_id)
    assert bench.ran == ["a0", "b0", "c0", "b1", "a1", "c1"]


def test_an_exception_is_the_answer_of_its_request_alone(bench: Bench):
    def wrong() -> Reply:
        raise RequestError("datum 3 is empty")

    def bug() -> Reply:
        raise ZeroDivisionError("oops")

    bench.worker.start()
    ids = [bench.send("a", 0, wrong), bench.send("a", 1, bug), bench.send("a", 2)]
    answers = [bench.result(request_id) for request_id in ids]
    assert answers[0] == '{"error": "datum 3 is empty", "category": "user"}'
    assert "ZeroDivisionError: oops" in answers[1] and '"server"' in answers[1]
    assert answers[2] == "a2"
    assert bench.worker.alive


def test_an_unknown_run_is_a_failed_future(bench: Bench):
    bench.worker.start()
    assert "unknown" in bench.result(bench.send("nowhere", 1))


def test_a_closed_run_answers_what_was_waiting(bench: Bench):
    waiting = bench.send("a", 5)
    bench.worker.close_line("a", "its session has ended")
    told = bench.result(waiting)
    assert "This work of the training run a was still waiting" in told  # where
    assert "its session has ended. Connect again; " in told  # what, and what to do


def test_more_held_requests_than_allowed_fail_at_once():
    bench = Bench(Limits(held_requests=2, gap_s=60))
    bench.worker.open_line("a", "x")
    ids = [bench.send("a", seq) for seq in (5, 6, 7)]
    assert "waiting" in bench.result(ids[2])
    assert bench.futures.find(ids[0], "me").reply is None


def test_waiting_samples_are_decoded_as_one_batch(bench: Bench):
    sampler = FakeSampler(FakeBase())
    jobs = [bench.sample(sampler, learner) for learner in "abcdef"]
    bench.worker.start()
    for job in jobs:
        assert reply_of(job.pending) == "done"
    assert sampler.batch_sizes == [6, 6]


def test_each_sample_of_a_batch_is_answered_when_it_ends(bench: Bench):
    sampler = FakeSampler(FakeBase(), step_s=0.01)
    jobs = [bench.sample(sampler, max_tokens=tokens) for tokens in (1, 40, 3, 3)]
    bench.worker.start()
    for job in (jobs[0], jobs[2], jobs[3]):
        assert reply_of(job.pending) == "done"
    assert jobs[1].pending.reply is None
    assert reply_of(jobs[1].pending) == "done"


def test_samples_that_end_soon_after_each_other_are_answered_together():
    """A client that reads an answer slows the others' next token down."""
    bench, sampler = Bench(Limits(together_s=0.3)), FakeSampler(FakeBase(), step_s=0.01)
    jobs = [bench.sample(sampler, max_tokens=tokens) for tokens in (1, 5, 200)]
    began, answered = time.monotonic(), []
    for job in jobs:
        assert job is not None
        job.pending.when_settled(lambda: answered.append(time.monotonic() - began))
    bench.worker.start()
    assert reply_of(jobs[1].pending) == "done"
    assert jobs[2].pending.reply is None  # still decoded: nobody waits for the last
    assert len(answered) == 2 and answered[1] - answered[0] < 0.02 and answered[0] > 0.25
    assert reply_of(jobs[2].pending) == "done"
    bench.worker.stop()


def test_an_answer_waits_for_nobody_elses():
    bench, sampler = Bench(Limits(together_s=30)), FakeSampler(FakeBase(), step_s=0.01)
    mine, anothers = bench.sample(sampler, "a", 1), bench.sample(sampler, "b", 300)
    assert mine is not None and anothers is not None
    bench.worker.start()
    assert reply_of(mine.pending) == "done" and anothers.pending.reply is None
    bench.worker.stop()


def test_the_last_of_a_batch_is_answered_at_once():
    bench, sampler = Bench(Limits(together_s=30)), FakeSampler(FakeBase())
    jobs = [bench.sample(sampler, max_tokens=tokens) for tokens in (1, 2)]
    bench.worker.start()
    for job in jobs:
        assert job is not None and reply_of(job.pending) == "done"
    bench.worker.stop()


def test_training_is_not_begun_before_what_was_sampled_is_answered():
    bench, sampler = (
        Bench(Limits(together_s=30, sample_slice_s=0.02)),
        FakeSampler(FakeBase(), 0.01),
    )
    bench.worker.open_line("a", "learner-1")
    short, long = bench.sample(sampler, max_tokens=1), bench.sample(sampler, max_tokens=500)
    assert short is not None and long is not None
    bench.worker.start()
    time.sleep(0.1)
    assert bench.result(bench.send("a", 0)) == "a0"
    assert short.pending.reply is not None and long.pending.reply is None
    bench.worker.stop()


def test_a_sample_that_comes_later_joins_the_batch(bench: Bench):
    sampler = FakeSampler(FakeBase(), step_s=0.02)
    first = bench.sample(sampler, max_tokens=30)
    first.pending.ask()
    bench.worker.start()
    time.sleep(0.15)
    second = bench.sample(sampler, max_tokens=2)
    reply_of(second.pending)
    assert first.pending.reply is None
    assert sampler.batch_sizes[0] == 1 and 2 in sampler.batch_sizes


def test_samples_begin_together_when_all_have_come_and_are_asked_for():
    bench, sampler = Bench(Limits(pause_s=0.2, gather_s=30)), FakeSampler(FakeBase())
    bench.worker.start()
    jobs = []
    for _ in range(3):
        time.sleep(0.02)
        jobs.append(bench.sample(sampler))
        jobs[-1].pending.ask()
    for job in jobs:
        assert job is not None and bench.result(job.pending.request_id) == "done"
    assert sampler.batch_sizes == [3, 3]

    waiting = bench.sample(sampler)
    assert waiting is not None
    with pytest.raises(TimeoutError):
        bench.result(waiting.pending.request_id, timeout_s=0.5)
    waiting.pending.ask()
    assert bench.result(waiting.pending.request_id) == "done"
    bench.worker.stop()


def test_samples_that_nobody_asks_for_begin_all_the_same():
    bench, sampler = Bench(Limits(gather_s=0.1)), FakeSampler(FakeBase())
    bench.worker.start()
    job = bench.sample(sampler)
    assert job is not None
    assert bench.result(job.pending.request_id) == "done"
    bench.worker.stop()


def test_samples_that_never_pause_are_not_waited_for_for_ever():
    bench, sampler = Bench(Limits(pause_s=30, gather_s=0.1)), FakeSampler(FakeBase())
    bench.worker.start()
    job = bench.sample(sampler)
    assert job is not None
    job.pending.ask()
    assert bench.result(job.pending.request_id) == "done"
    bench.worker.stop()


def test_samples_of_a_client_that_polls_for_all_count_as_asked_for():
    bench = Bench()
    first = bench.futures.open("me", ("session", 0))
    other = bench.futures.open("me", ("session", 1))
    bench.futures.listen(("session", 0), lambda: None)
    second = bench.futures.open("me", ("session", 0))
    assert first.asked and second.asked and not other.asked


def test_training_that_waits_is_not_held_up_for_samples_nobody_asks_for():
    bench, sampler = Bench(Limits(gather_s=30)), FakeSampler(FakeBase())
    bench.worker.open_line("a", "learner-1")
    ids = [bench.send("a", seq) for seq in range(3)]
    job = bench.sample(sampler)
    assert job is not None
    bench.worker.start()
    assert [bench.result(i) for i in ids] == ["a0", "a1", "a2"]
    assert bench.result(job.pending.request_id) == "done"
    bench.worker.stop()


def test_one_call_for_all_the_rows_does_not_hold_up_anothers_one(bench: Bench):
    sampler = FakeSampler(FakeBase(), step_s=0.02)
    large = bench.sample(sampler, "a", max_tokens=60, samples=LIMITS.active_sequences)
    large.pending.ask()
    bench.worker.start()
    time.sleep(0.1)
    small = bench.sample(sampler, "b", max_tokens=2)
    reply_of(small.pending)
    assert large.pending.reply is None


def test_one_learners_many_samples_do_not_hold_up_anothers_one(bench: Bench):
    sampler = FakeSampler(FakeBase(), step_s=0.005)
    many = [bench.sample(sampler, "greedy", max_tokens=10) for _ in range(19)]
    one = bench.sample(sampler, "modest", max_tokens=10)
    bench.worker.start()
    reply_of(one.pending)
    assert sum(job.pending.reply is not None for job in many) <= 8
    for job in many:
        reply_of(job.pending)


def test_too_many_waiting_samples_are_sent_away(bench: Bench):
    sampler = FakeSampler(FakeBase())
    assert all(bench.sample(sampler) for _ in range(20))
    assert bench.sample(sampler) is None
    bench.worker.start()


def test_a_learner_who_fills_the_queue_keeps_nobody_else_out(bench: Bench):
    """The bound was one for all: four calls for 1,024 samples shut every other learner out."""
    sampler = FakeSampler(FakeBase())
    assert all(bench.sample(sampler, "greedy", samples=5) for _ in range(4))
    assert bench.sample(sampler, "greedy") is None
    assert bench.sample(sampler, "modest", samples=8)
    assert bench.sample(sampler, "modest", samples=2)
    assert bench.sample(sampler, "modest") is None  # 10 are the half of 20
    assert bench.sample(sampler, "third", samples=7)
    bench.worker.start()


def test_a_call_waits_as_so_many_samples_as_it_asks_for_and_only_while_it_waits(bench: Bench):
    sampler = FakeSampler(FakeBase())
    first, second = (bench.sample(sampler, samples=8) for _ in range(2))
    assert bench.sample(sampler, samples=8) is None  # 24 of 20
    bench.worker.start()
    for job in (first, second):
        reply_of(job.pending)
    assert reply_of(bench.sample(sampler, samples=20).pending) == "done"


def test_training_and_sampling_take_turns(bench: Bench):
    """A long decode let every training request wait until it was done."""
    sampler = FakeSampler(FakeBase(), step_s=0.005)
    long_sample = bench.sample(sampler, max_tokens=200)
    bench.worker.start()
    time.sleep(0.05)
    for seq in range(5):
        bench.result(bench.send("a", seq), 1)
    assert long_sample.pending.reply is None
    reply_of(long_sample.pending, 10)


def test_training_does_not_starve_sampling(bench: Bench):
    sampler = FakeSampler(FakeBase())
    stop = threading.Event()

    def slow() -> Reply:
        time.sleep(0.01)
        return Reply(b"")

    def flood() -> None:
        for seq in range(500):
            if stop.is_set():
                return
            bench.send("a", seq, slow)

    flood()
    bench.worker.start()
    job = bench.sample(sampler, max_tokens=3)
    assert reply_of(job.pending, 2) == "done"
    stop.set()
    bench.worker.close_line("a", "over")


def test_a_broken_decoder_fails_its_calls_and_serves_the_next(bench: Bench):
    sampler = FakeSampler(FakeBase())
    sampler.broken = True
    job = bench.sample(sampler)
    bench.worker.start()
    assert "the decoder broke" in reply_of(job.pending)
    assert reply_of(bench.sample(sampler).pending) == "done"


def test_a_broken_decoder_fails_no_other_models_calls(bench: Bench):
    broken, whole = FakeSampler(FakeBase()), FakeSampler(FakeBase(), step_s=0.01)
    going = bench.sample(whole, max_tokens=20)
    bench.worker.start()
    while not whole.batch_sizes:
        time.sleep(0.01)
    broken.broken = True
    assert "the decoder broke" in reply_of(bench.sample(broken).pending)
    assert reply_of(going.pending) == "done"


def test_a_sample_that_was_cancelled_while_it_waited_is_never_begun(bench: Bench):
    sampler = FakeSampler(FakeBase())
    job = bench.sample(sampler)
    job.pending.cancelled = True
    bench.worker.start()
    assert "cancelled" in reply_of(job.pending)
    assert not sampler.weights_seen


def test_a_cancelled_sample_stops_early(bench: Bench):
    sampler = FakeSampler(FakeBase(), step_s=0.01)
    job = bench.sample(sampler, max_tokens=10_000)
    bench.worker.start()
    while not sampler.batch_sizes:  # after 0.05 s it was still waiting to be asked for
        time.sleep(0.01)
    job.pending.cancelled = True
    assert '"The sample call was cancelled", "category": "user"' in reply_of(job.pending)
    assert len(sampler.batch_sizes) < 100


def test_stopping_answers_everything_that_waits(bench: Bench):
    waiting = bench.send("a", 3)
    sample = bench.sample(FakeSampler(FakeBase()))
    bench.worker.start()
    bench.worker.stop()
    assert "stopped" in bench.result(waiting) or bench.ran
    assert sample.pending.reply is not None


def test_a_request_that_outlasts_the_stop_is_answered_all_the_same(bench: Bench):
    """Its client was never told: the process ended before the request did."""
    end = threading.Event()
    endless = bench.send("a", 0, lambda: Reply(b"late" if end.wait(5) else b"never"))
    bench.worker.start()
    time.sleep(0.1)
    bench.worker.stop(timeout_s=0.1)
    assert "stopped" in bench.result(endless)
    end.set()


def test_a_request_that_waits_behind_an_errand_at_the_stop_is_answered(bench: Bench):
    """It had left its line and was not being computed yet: nobody knew of it."""
    begun, end = threading.Event(), threading.Event()
    bench.worker.errand(begun.set)
    bench.worker.errand(lambda: end.wait(5) and None)
    taken = bench.send("a", 0)
    bench.worker.start()
    assert begun.wait(5)
    bench.worker.stop(timeout_s=0.05)
    try:
        assert "stopped" in bench.result(taken, 0.1)
    finally:
        end.set()


def test_samples_that_have_ended_and_wait_for_others_at_the_stop_are_answered():
    bench, sampler = Bench(Limits(together_s=30, gather_s=0)), FakeSampler(FakeBase())
    begun, end, step = threading.Event(), threading.Event(), sampler.step

    def slow_from_the_second_on() -> None:
        if sampler.batch_sizes:
            begun.set()
            end.wait(5)
        step()

    sampler.step = slow_from_the_second_on
    jobs = [bench.sample(sampler, max_tokens=tokens) for tokens in (1, 9)]
    bench.worker.start()
    assert begun.wait(5)
    bench.worker.stop(timeout_s=0.05)
    try:
        for job in jobs:
            assert job is not None and "stopped" in reply_of(job.pending, 0.1)
    finally:
        end.set()


def test_a_sample_whose_weights_are_being_read_at_the_stop_is_answered():
    bench = Bench(Limits(gather_s=0))
    begun, end = threading.Event(), threading.Event()
    job = bench.sample(FakeSampler(FakeBase()))
    assert job is not None
    job.weights = lambda: [begun.set(), end.wait(5)]
    bench.worker.start()
    assert begun.wait(5)
    bench.worker.stop(timeout_s=0.05)
    try:
        assert "stopped" in reply_of(job.pending, 0.1)
    finally:
        end.set()


def test_what_comes_after_the_stop_is_answered_at_once(bench: Bench):
    bench.worker.start()
    bench.worker.stop()
    bench.worker.open_line("c", "learner-3")
    sample = bench.sample(FakeSampler(FakeBase()))
    assert "stopped" in bench.result(bench.send("a", 0))
    assert "stopped" in bench.result(bench.send("c", 0))
    assert "start it again, by connect()" in bench.result(bench.send("a", 1))
    assert sample is not None and "stopped" in reply_of(sample.pending)


def test_stopping_answers_what_is_being_decoded(bench: Bench):
    sampler = FakeSampler(FakeBase(), step_s=0.01)
    job = bench.sample(sampler, max_tokens=10_000)
    bench.worker.start()
    while not sampler.batch_sizes:
        time.sleep(0.01)
    bench.worker.stop()
    assert "stopped" in reply_of(job.pending, 0.1)


def test_a_fetched_result_stays_for_a_while_and_then_goes():
    clock = [0.0]
    table = FutureTable(Limits(keep_delivered_s=60), clock=lambda: clock[0])
    pending = table.open("me")
    table.settle(pending, Reply(b"x"))
    table.delivered(pending)
    clock[0] = 59
    assert table.find(pending.request_id, "me") is pending
    clock[0] = 61
    table.settle(table.open("me"), Reply(b"y"))
    assert table.find(pending.request_id, "me") is None


def test_a_result_that_nobody_will_fetch_goes_like_a_fetched_one():
    """Results of cancelled calls, and of sessions that had ended, stayed as long as the engine."""
    clock = [0.0]
    table = FutureTable(Limits(keep_delivered_s=60), clock=lambda: clock[0])
    cancelled, early, late, another = [table.open("me") for _ in range(4)]
    early.session = late.session = "ended"
    for pending in (cancelled, early, another):
        table.settle(pending, Reply(b"x"))
    table.cancel(cancelled.request_id, "me")
    table.end_session("ended")
    assert late.cancelled and not another.cancelled
    table.settle(late, Reply(b"x"))
    clock[0] = 59
    table.settle(table.open("me"), Reply(b"y"))
    assert len(table) == 5
    clock[0] = 61
    table.settle(table.open("me"), Reply(b"y"))
    assert table.find(another.request_id, "me") is another and len(table) == 3


def test_only_the_owner_cancels():
    table = FutureTable(Limits())
    pending = table.open("alice")
    table.cancel(pending.request_id, "bob")
    assert not pending.cancelled


def test_a_sampling_session_that_has_ended_reports_no_more():
    table = FutureTable(Limits())
    pending = table.open("me", ("s", 0))
    table.close_streams("s")
    table.settle(pending, Reply(b"x"))
    assert table.completions(("s", 0), 0) == [] and not table._streams


def test_results_are_bounded_in_bytes_the_oldest_go_first():
    table = FutureTable(Limits(keep_results_bytes=100))
    pendings = [table.open("me") for _ in range(5)]
    waiting = table.open("me")
    for pending in pendings:
        table.settle(pending, Reply(bytes(40)))
    kept = [table.find(pending.request_id, "me") is not None for pending in pendings]
    assert kept == [False, False, False, True, True]
    assert table.find(waiting.request_id, "me") is waiting


def test_what_was_fetched_goes_before_what_was_not_when_room_is_needed():
    table = FutureTable(Limits(keep_results_bytes=100))
    unfetched, fetched, newest = (table.open("me") for _ in range(3))
    table.settle(unfetched, Reply(bytes(40)))
    table.settle(fetched, Reply(bytes(40)))
    table.delivered(fetched)
    table.settle(newest, Reply(bytes(40)))
    assert table.find(unfetched.request_id, "me") and table.find(newest.request_id, "me")
    assert table.find(fetched.request_id, "me") is None


def test_a_forgotten_result_gives_its_room_back():
    table = FutureTable(Limits(keep_results_bytes=100))
    for _ in range(3):
        pending = table.open("me")
        table.settle(pending, Reply(bytes(100)))
        assert table.find(pending.request_id, "me") is pending
        table.forget([pending.request_id], "me")


def test_a_result_that_is_fetched_again_stays_longer_and_holds_up_no_other():
    clock = [0.0]
    table = FutureTable(Limits(keep_delivered_s=60), clock=lambda: clock[0])
    again, once = table.open("me"), table.open("me")
    for clock[0], pending in ((0.0, again), (10.0, once), (50.0, again)):
        table.settle(pending, Reply(b"x"))
        table.delivered(pending)
    clock[0] = 75.0
    table.settle(table.open("me"), Reply(b"y"))
    assert table.find(again.request_id, "me") is again
    assert table.find(once.request_id, "me") is None


def test_the_first_result_of_a_request_counts():
    table = FutureTable(Limits())
    pending = table.open("me", ("s", 0))
    for body in (b"first", b"second"):
        table.settle(pending, Reply(body))
    assert reply_of(pending) == "first"
    assert len(table.completions(("s", 0), 0)) == 1


def test_a_request_without_a_result_is_not_forgotten_and_one_taken_back_is():
    table = FutureTable(Limits())
    kept, discarded = table.open("me"), table.open("me")
    table.forget([kept.request_id], "me")
    table.discard(discarded)
    assert table.find(kept.request_id, "me") is kept
    assert table.find(discarded.request_id, "me") is None


def test_who_polls_one_client_asks_for_its_requests_only():
    table = FutureTable(Limits())
    mine, anothers = table.open("me", ("s", 0)), table.open("me", ("t", 0))
    table.listen(("s", 0), lambda: None)
    assert mine.asked and not anothers.asked


def test_failures_are_reported_in_bulk_as_such_until_the_session_ends():
    table = FutureTable(Limits())
    table.settle(table.open("me", ("s", 0)), failure_reply("broken"))
    ((_, _, failed, _),) = table.completions(("s", 0), 0)
    assert failed
    table.close_streams("s")
    assert table.completions(("s", 0), 0) == []


def test_who_took_a_listener_back_hears_nothing_and_the_others_do():
    pending, told = Pending("me"), []
    tells = [lambda: told.append("first"), lambda: told.append("second")]
    for tell in tells:
        pending.when_settled(tell)
    pending.unlisten(tells[0])
    assert pending.settle(Reply(b"")) and told == ["second"]


def test_who_waits_for_a_question_is_woken_by_it():
    pending = Pending("me")
    waiting = threading.Thread(target=pending.wait_until_asked, args=(30,))
    waiting.start()
    while pending._bell is None:
        time.sleep(0.001)
    pending.ask()
    waiting.join(10)
    assert not waiting.is_alive()


def test_nobody_waits_for_the_requests_of_a_table_that_is_closed():
    table, told = FutureTable(LIMITS), []
    table.listen(("s", 0), lambda: told.append("before"))
    table.close()
    table.listen(("s", 1), lambda: told.append("after"))
    assert told == ["before", "after"]


def test_a_result_is_found_by_its_owner_only():
    table = FutureTable(Limits())
    pending = table.open("alice")
    assert table.find(pending.request_id, "bob") is None
    table.settle(pending, Reply(b"x"))
    table.forget([pending.request_id], "bob")
    assert table.find(pending.request_id, "alice") is pending
    table.forget([pending.request_id], "alice")
    assert table.find(pending.request_id, "alice") is None


def test_finished_samples_are_reported_in_bulk_after_a_cursor():
    table = FutureTable(Limits())
    pendings = [table.open("me", ("s", 0)) for _ in range(3)]
    heard: list[str] = []
    for listener in ("first", "second"):
        table.listen(("s", 0), partial(heard.append, listener))
    gone = partial(heard.append, "gone")
    table.listen(("s", 0), gone)
    table.unlisten(("s", 0), gone)
    for pending in pendings[:2]:
        table.settle(pending, Reply(b"xy"))
    assert heard == ["first", "second"]  # each once
    reports = table.completions(("s", 0), 0)
    assert [(cursor, failed, size) for cursor, _, failed, size in reports] == [
        (1, False, 2),
        (2, False, 2),
    ]
    assert [report[1] for report in reports] == [p.request_id for p in pendings[:2]]
    assert table.completions(("s", 0), 2) == []
    assert table.completions(("s", 1), 0) == []


def test_a_report_goes_with_the_result_that_was_fetched():
    """A client that does not poll in bulk never took any: they stayed as long as its session."""
    clock = [0.0]
    table = FutureTable(Limits(keep_delivered_s=60), clock=lambda: clock[0])
    for clock[0] in range(0, 1000, 10):
        pending = table.open("me", ("s", 0))
        table.settle(pending, Reply(b"x"))
        table.delivered(pending)
    assert len(table) == len(table._streams["s", 0].finished) == 6
    assert [report[0] for report in table.completions(("s", 0), 97)] == [98, 99, 100]


def test_who_polls_in_bulk_hears_of_a_result_that_had_to_go():
    """It then asks for it, is told that it is gone, and sends the call again."""
    table = FutureTable(Limits(keep_results_bytes=100))
    for _ in range(2):
        table.settle(table.open("me", ("s", 0)), Reply(bytes(80)))
    assert len(table) == 1 and len(table.completions(("s", 0), 0)) == 2


def test_what_is_done_ahead_waits_for_an_idle_moment(bench: Bench):
    bench.worker.start()
    done = threading.Event()
    bench.worker.if_idle(done.set)
    assert done.wait(5)


def test_what_is_done_ahead_is_left_out_where_requests_wait(bench: Bench):
    bench.worker.start()
    second: list[str] = []

    def work() -> Reply:
        bench.worker.if_idle(lambda: bench.ran.append("ahead"))
        second.append(bench.send("a", 1))
        return Reply(b"done")

    assert bench.result(bench.send("a", 0, work)) == "done"
    assert bench.result(second[0]) == "a1"
    later = threading.Event()
    bench.worker.if_idle(later.set)
    assert later.wait(5)
    assert bench.ran == ["a1"]
