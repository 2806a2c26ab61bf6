"""Who is decoded with whom? Requests join the batch of their weights and leave when done.

Reported log-probabilities are those of the distribution softmax(logits / temperature) over the
whole vocabulary: before top_k and top_p cut it, and at temperature 1 when decoding is greedy
(temperature 0). The stop token, or the tokens that complete a stop string, are part of the
completion. Given `stop`, only that stops; the end-of-text token stops when nothing was given, and
`[]` turns every stop off.

`deterministic=True` gives every request a batch of its own, so that not even the rounding of its
numbers depends on what else is running; it is slower. Without it the random stream of a sample
still depends on its seed alone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from course_lib.engine.cores import cores_for
from course_lib.engine.decoding import Batch, Row
from course_lib.engine.model import BaseModel, SamplerWeights
from course_lib.engine.prompts import asks_about_prompt, describe_prompt
from course_lib.engine.randomness import random_bits
from course_lib.engine.requests import BLOWN_UP, RequestError, SampleRequest, SampleResult
from course_lib.engine.validation import check_sample

KEPT_FOLDED = 2  # folded weights kept for the next request, at most; one however large
KEPT_BYTES = 2 << 30  # which they may take together
CACHE_BYTES = 4 << 30  # of keys and values that all rows may come to; one request however large
PATIENCE = 512  # steps for which who finds no memory lets others pass
STEPS_TO_LOOK = 8  # after so many it is asked who has given up


@dataclass(eq=False)
class Job:
    """One request on its way: its rows wait, live in a batch, or have ended."""

    request: SampleRequest
    weights: SamplerWeights
    seed: int
    rows: list[Row]
    future: Future = field(default_factory=Future)
    admitted: int = 0  # rows that have left the queue
    passed: int = 0  # how often it found no room, and others went on
    result: SampleResult = field(default_factory=lambda: SampleResult([]))

    def next_rows(self, room: int, share: int, whole: bool) -> list[Row]:
        """Its next rows, as many as there is room for and as its share allows; `whole`: a share at
        once, or none."""
        live = self.live
        rows = self.rows[self.admitted : self.admitted + share - (0 if whole else live)]
        if whole:
            return [] if live or len(rows) > room else rows
        return rows[:room]

    @property
    def live(self) -> int:
        """How many of its rows are being decoded."""
        return sum(1 for row in self.rows[: self.admitted] if not row.stop_reason)

    @property
    def columns(self) -> int:
        """As many as each of its rows may come to in the cache."""
        return len(self.request.prompt) + self.rows[0].limit

    def finish(self) -> None:
        self.result.sequences = [row.result() for row in self.rows]
        self.future.set_result(self.result)

    @property
    def ended(self) -> bool:
        return self.admitted == len(self.rows) and all(row.stop_reason for row in self.rows)


@dataclass
class Room:
    """What may join those that are being decoded."""

    rows: int
    cache_bytes: int

    def take(self, rows: int, row_bytes: int) -> None:
        self.rows -= rows
        self.cache_bytes -= rows * row_bytes


class Sampler:
    """Decodes all requests for one base model; `submit` from any thread, the rest from one."""

    def __init__(
        self,
        base: BaseModel,
        *,
        deterministic: bool = False,
        max_rows: int = 256,
        prefill_tokens: int = 8192,
        folded_bytes: int = KEPT_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.base = base
        self.deterministic = deterministic
        self.max_rows = max_rows  # decoded at once, over all batches
        self.prefill_tokens = prefill_tokens  # of prompts computed in one go
        # Of folded weights kept, and as much of those decoded with, unless it is one alone.
        self.folded_bytes = folded_bytes
        self.cache_bytes = cache_bytes  # of keys and values, unless it is one request alone
        self._column_bytes = column_bytes(base)
        self._forward = base.sampling_forward(reorders=not deterministic)
        self._steps = 0
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._batches: OrderedDict[object, Batch] = OrderedDict()
        self._folded: OrderedDict[SamplerWeights, Any] = OrderedDict()

    def submit(self, request: SampleRequest, weights: SamplerWeights) -> Future[SampleResult]:
        """Check a request and queue it; the future has its result once steps have made it."""
        check_sample(request, self.base.vocab_size, self.base.context_length)
        if not weights.sound:
            raise RequestError(f"the weights hold numbers that are not finite: {BLOWN_UP}")
        seed = random_bits(62) if request.seed is None else request.seed
        limit = request.max_tokens or self.base.context_length - len(request.prompt)
        stops = stop_rule(request, self.base.tokenizer)
        rows = [Row(request, i, seed + i, limit, *stops) for i in range(request.num_samples)]
        job = Job(request, weights, seed, rows)
        self._waiting.append(job)
        return job.future

    def step(self) -> bool:
        """Admit what fits, then draw a token for each row of one batch; False when all is done."""
        self._steps += 1
        if self._steps % STEPS_TO_LOOK == 1:
            self._drop_cancelled()
        some_ended = self._admit()  # a first token may be the last
        if self._batches:
            key, batch = self._batches.popitem(last=False)  # batches take turns
            if batch.rows:
                with cores_for(self.base.parameter_count, len(batch.rows)):
                    some_ended |= batch.step()
            if batch.rows:
                self._batches[key] = batch
        if some_ended:
            for job in [job for job in self._running if job.ended]:
                job.finish()
            self._running = [job for job in self._running if not job.future.done()]
        return bool(self._batches or self._waiting)

    def run_until_idle(self) -> None:
        """Step until every submitted request has its result."""
        while self.step():
            pass

    def reset(self) -> None:
        """After a failure: forget every request. Their futures are cancelled."""
        for job in [*self._waiting, *self._running]:
            job.future.cancel()
        self._waiting.clear()
        self._running, self._batches = [], OrderedDict()

    def _drop_cancelled(self) -> None:
        gone = [job for job in [*self._waiting, *self._running] if job.request.cancelled()]
        if gone:
            self._take_out(gone)
        for job in gone:
            job.future.cancel()

    def _take_out(self, jobs: list[Job]) -> None:
        """Forget these requests, wherever their rows are."""
        for job in jobs:
            for row in job.rows:
                row.stop_reason = row.stop_reason or "length"
        for batch in self._batches.values():
            batch.drop_ended()
        self._waiting = deque(job for job in self._waiting if job not in jobs)
        self._running = [job for job in self._running if job not in jobs]

    def _fail(self, group: list[tuple[Job, list[Row]]], error: Exception) -> None:
        """Give this group of requests up; and others only where their batch broke with it."""
        jobs = [job for job, _ in group]
        for key, batch in [*self._batches.items()]:
            if not batch.whole:
                del self._batches[key]
                jobs += [j for j in self._running if j not in jobs and batch.holds(j.rows)]
        self._take_out(jobs)
        for job in jobs:
            job.future.set_exception(error)

    def _admit(self) -> bool:
        """Move waiting rows into batches, oldest first, as far as rows and prompt tokens allow. Did
        any move?"""
        if not self._waiting:
            return False
        room = self._room()
        held_back: list[Job] = []  # they have their share, or find no room: others may pass
        admitted = False
        try:
            while self._waiting and room.rows > 0:
                group = self._next_group(room, held_back)
                if not group:
                    continue
                admitted = True
                try:
                    self._prefill(group)
                except Exception as error:  # as where the logits of a prompt find no memory
                    self._fail(group, error)
        finally:
            held_back = [job for job in held_back if not job.future.done()]
            self._waiting.extendleft(reversed(held_back))
        return admitted

    def _room(self) -> Room:
        """What the rows that are being decoded leave."""
        room = Room(self.max_rows, self.cache_bytes)
        for job in self._running:
            room.take(job.live, self._column_bytes * job.columns)
        return room

    def _next_group(self, room: Room, held_back: list[Job]) -> list[tuple[Job, list[Row]]]:
        """Prompts to compute together, with the rows that draw from each; they take of the room.

        Deterministic: how a request is cut must not depend on the others, and all go in order, or a
        large one would never find room.
        """
        group: list[tuple[Job, list[Row]]] = []
        longest = 0  # of the prompts
        while self._waiting and self._joins(self._waiting[0], group, longest):
            job = self._waiting.popleft()
            rows = self._rows_for(job, room, alone=not (self._batches or group))
            job.admitted += len(rows)
            if job.admitted < len(job.rows):
                held_back.append(job)
            if rows:
                group.append((job, rows))
                longest = max(longest, len(job.request.prompt))
                room.take(len(rows), self._column_bytes * job.columns)
                if job not in self._running:
                    self._running.append(job)
                continue
            job.passed += not job.live  # else it has its share
            if self.deterministic or job.passed > PATIENCE:
                room.rows = 0
                break
        return group

    def _rows_for(self, job: Job, room: Room, alone: bool) -> list[Row]:
        """A request's next rows, as far as the room allows, and for one alone only its rows."""
        count = room.rows
        if not alone:
            if not self._affords(job.weights):
                return []
            count = min(count, max(0, room.cache_bytes // (self._column_bytes * job.columns)))
        return job.next_rows(count, share_of(self.max_rows), whole=self.deterministic)

    def _affords(self, weights: SamplerWeights) -> bool:
        """Are these weights decoded with now, or may they lie in memory beside those that are?"""
        if weights in self._batches or any(job.weights is weights for job in self._running):
            return True
        live = {id(batch.weights): batch.weights for batch in self._batches.values()}
        sizes = [self._forward.nbytes(folded) for folded in live.values()]
        known = self._folded.get(weights)
        theirs = max(sizes, default=0) if known is None else self._forward.nbytes(known)
        return sum(sizes) + theirs <= self.folded_bytes

    def _joins(self, job: Job, group: list[tuple[Job, list[Row]]], longest: int) -> bool:
        """May this request's prompt be computed together with the group's, of at most `longest`
        tokens?"""
        if not group:
            return True
        first = group[0][0]
        return (
            not self.deterministic
            and job.weights is first.weights
            and asks_about_prompt(job.request) == asks_about_prompt(first.request)
            and max(longest, len(job.request.prompt)) * (len(group) + 1) <= self.prefill_tokens
        )

    def _prefill(self, group: list[tuple[Job, list[Row]]]) -> None:
        """Compute the group's prompts and put its rows into the batch of their weights."""
        first, rows = group[0]
        key = rows[0] if self.deterministic else first.weights
        batch = self._batches.get(key)
        every = asks_about_prompt(first.request)
        prompts = [job.request.prompt for job, _ in group]
        with cores_for(self.base.parameter_count, sum(map(len, prompts))):
            if batch is None:
                batch = Batch(self._forward, self._fold(first.weights))
            logits = batch.admit(prompts, [rows for _, rows in group], every)
        for (job, _), its_logits in zip(group, logits, strict=True) if every else ():
            describe_prompt(job.result, job.request, its_logits(), job.seed)
        if batch.rows:
            self._batches[key] = batch

    def _fold(self, weights: SamplerWeights) -> Any:
        """The snapshot's weights, folded at most once while it is in use."""
        if weights not in self._folded:
            while self._folded and not self._fits_another():
                self._folded.popitem(last=False)
            self._folded[weights] = self._forward.prepare(weights.state)
        self._folded.move_to_end(weights)
        return self._folded[weights]

    def _fits_another(self) -> bool:
        """May one more, as large as the largest, lie in memory beside those kept?"""
        sizes = [self._forward.nbytes(folded) for folded in self._folded.values()]
        return len(sizes) < KEPT_FOLDED and sum(sizes) + max(sizes) <= self.folded_bytes


def column_bytes(base: BaseModel) -> int:
    """What the keys and values of one token take, over all layers."""
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim * base.plain.dtype.itemsize


def share_of(rows: int) -> int:
    """As many of the rows as one request may have at a time: others find room beside it."""
    return max(1, rows * 3 // 4)


def stop_rule(
    request: SampleRequest, tokenizer: PreTrainedTokenizerBase
) -> tuple[frozenset[int], Callable[[list[int]], bool] | None]:
    """The tokens that stop, and for stop strings a check whether the tokens so far complete one."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    if stop is None:
        stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    strings = [item for item in stop if isinstance(item, str)]
    if not strings:
        return frozenset(int(item) for item in stop), None
    longest = max(len(string.encode()) for string in strings) + 4  # a token has a byte at least

    def completes_a_string(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens[-longest:], skip_special_tokens=False)
        return any(string in text for string in strings)

    return frozenset(), completes_a_string
