"""How does an answer find its way back? One `Pending` per accepted request, fetched by its id.

A request is answered at once with an id; the result waits here until it is fetched. A fetched
result stays for a minute, because the reply that carried it may have been lost; so does one that
nobody will fetch, because its request was cancelled or its session has ended.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from course_lib.engine.limits import Limits
from course_lib.engine.randomness import random_bits
from course_lib.engine.wire import Reply

Report = tuple[int, str, bool, int]  # cursor, request id, failed, bytes
_REPORTS = 20_000  # of one client: the last finished requests that nobody has fetched


class Pending:
    """One accepted request, and its reply once it is there.

    Thousands are kept for a minute. So none has a future or an event of its own until somebody
    waits: each is ten objects or more that Python's collector would visit again and again.
    """

    __slots__ = (
        "_bell",
        "_listeners",
        "asked",
        "cancelled",
        "delivered_at",
        "owner",
        "reply",
        "request_id",
        "session",
        "stream",
    )
    _lock = threading.Lock()  # of them all: none is held for long

    def __init__(self, owner: str, stream: tuple[str, int] | None = None) -> None:
        self.request_id = f"{random_bits(128):032x}"
        self.owner = owner
        self.stream = stream  # (sampling session, clone): samples are also reported in bulk
        self.session = ""  # with which it ends; known once it is queued
        self.reply: Reply | None = None
        self.asked = False  # does somebody wait for the reply?
        self.cancelled = False
        self.delivered_at = 0.0
        self._bell: threading.Event | None = None
        self._listeners: tuple[Callable[[], None], ...] = ()

    def settle(self, reply: Reply) -> bool:
        """Take the reply, and tell those who listen; False when there is one already."""
        with self._lock:
            if self.reply is not None:
                return False
            self.reply = reply
            listeners, self._listeners = self._listeners, ()
        for tell in listeners:
            tell()
        return True

    def when_settled(self, tell: Callable[[], None]) -> None:
        """Call this when the reply is there, from the thread that brings it; at once, if it is."""
        with self._lock:
            if self.reply is None:
                self._listeners += (tell,)
                return
        tell()

    def unlisten(self, tell: Callable[[], None]) -> None:
        """Take back a listener that has waited for long enough."""
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other != tell)

    def ask(self) -> None:
        """Somebody waits for the reply now."""
        with self._lock:
            self.asked, bell, self._bell = True, self._bell, None
        if bell is not None:
            bell.set()

    def wait_until_asked(self, timeout_s: float) -> None:
        """Block until somebody waits for the reply, or for so long."""
        with self._lock:
            if self.asked:
                return
            bell = self._bell = threading.Event()
        bell.wait(timeout_s)


class Stream:
    """The finished requests of one sampling client, numbered, for `retrieve_futures`."""

    def __init__(self) -> None:
        self.cursor = 0
        self.finished: OrderedDict[str, Report] = OrderedDict()  # by request id
        self.listeners: list[Callable[[], None]] = []
        self.polled = False  # every request of this client counts as asked for

    def add(self, request_id: str, reply: Reply) -> None:
        self.cursor += 1
        self.finished[request_id] = (self.cursor, request_id, reply.failed, len(reply.body))
        while len(self.finished) > _REPORTS:
            self.finished.popitem(last=False)

    def after(self, cursor: int) -> list[Report]:
        """What finished later; older ones go."""
        while self.finished and next(iter(self.finished.values()))[0] <= cursor:
            self.finished.popitem(last=False)
        return list(self.finished.values())


class FutureTable:
    """All requests that still have something to tell. Safe to call from any thread."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._table: OrderedDict[str, Pending] = OrderedDict()
        self._delivered: OrderedDict[str, Pending] = OrderedDict()
        self._streams: dict[tuple[str, int], Stream] = {}
        self._bytes = 0
        self._closed = False

    def open(self, owner: str, stream: tuple[str, int] | None = None) -> Pending:
        """Register a new request."""
        pending = Pending(owner, stream)
        with self._lock:
            self._table[pending.request_id] = pending
            if stream is not None and self._stream(stream).polled:
                pending.ask()
        return pending

    def _stream(self, key: tuple[str, int]) -> Stream:
        if key not in self._streams:
            self._streams[key] = Stream()
        return self._streams[key]

    def discard(self, pending: Pending) -> None:
        """Take back a request that was not accepted after all."""
        with self._lock:
            self._table.pop(pending.request_id, None)

    def find(self, request_id: str, owner: str) -> Pending | None:
        """The request, unless it is unknown, expired or another owner's."""
        with self._lock:
            pending = self._table.get(request_id)
        return pending if pending is not None and pending.owner == owner else None

    def settle(self, pending: Pending, reply: Reply) -> None:
        """Give the request its result; the first result counts."""
        if not pending.settle(reply):
            return
        with self._lock:
            self._bytes += len(reply.body)
            listeners = self._report(pending, reply)
            if pending.cancelled:
                self._may_go(pending)
        for tell in listeners:
            tell()
        self._make_room()

    def _report(self, pending: Pending, reply: Reply) -> list[Callable[[], None]]:
        stream = self._streams.get(pending.stream) if pending.stream is not None else None
        if stream is None:  # or its sampling session has ended
            return []
        stream.add(pending.request_id, reply)
        listeners, stream.listeners = stream.listeners, []
        return listeners

    def _unreport(self, pending: Pending) -> None:
        """Its client knows. One that never polls in bulk would have all its samples noted here."""
        stream = self._streams.get(pending.stream) if pending.stream is not None else None
        if stream is not None:
            stream.finished.pop(pending.request_id, None)

    def delivered(self, pending: Pending) -> None:
        """Note that the result went out; it may go when its time is up or room is needed."""
        with self._lock:
            self._may_go(pending)
        self._make_room()

    def cancel(self, request_id: str, owner: str) -> None:
        """Nobody will fetch this result; sampling stops for it, anything else runs to its end."""
        pending = self.find(request_id, owner)
        if pending is not None:
            with self._lock:
                self._cancel(pending)

    def end_session(self, session: str) -> None:
        """Cancel every request of a session that has ended."""
        with self._lock:
            for pending in self._table.values():
                if pending.session == session:
                    self._cancel(pending)

    def _cancel(self, pending: Pending) -> None:
        pending.cancelled = True
        if pending.reply is not None:
            self._may_go(pending)

    def _may_go(self, pending: Pending) -> None:
        """Keep the result for a while yet, from now on."""
        if pending.request_id in self._table:
            pending.delivered_at = self._clock()
            self._delivered[pending.request_id] = pending
            self._delivered.move_to_end(pending.request_id)

    def forget(self, request_ids: list[str], owner: str) -> None:
        """Free results that the client says it has."""
        with self._lock:
            for request_id in request_ids:
                pending = self._table.get(request_id)
                if pending is not None and pending.owner == owner and pending.reply:
                    self._drop(pending)

    def completions(self, stream: tuple[str, int], cursor: int) -> list[Report]:
        """What a sampling client's requests finished after the cursor."""
        with self._lock:
            return self._streams[stream].after(cursor) if stream in self._streams else []

    def listen(self, stream: tuple[str, int], tell: Callable[[], None]) -> None:
        """Call this once, from any thread, when a request of this sampling client finishes. All
        its requests count as asked for from now on."""
        with self._lock:
            its = self._stream(stream)
            its.listeners.append(tell)
            if not its.polled:
                its.polled = True
                for pending in self._table.values():
                    if pending.stream == stream:
                        pending.ask()
            closed = self._closed
        if closed:
            tell()

    def unlisten(self, stream: tuple[str, int], tell: Callable[[], None]) -> None:
        """Take back a listener that has not been called."""
        with self._lock:
            if stream in self._streams and tell in self._streams[stream].listeners:
                self._streams[stream].listeners.remove(tell)

    def close(self) -> None:
        """Nothing finishes any more, at the engine's end: who listens need not wait."""
        with self._lock:
            self._closed = True
            listeners = [tell for its in self._streams.values() for tell in its.listeners]
        for tell in listeners:
            tell()

    def close_streams(self, sampling_session: str) -> None:
        """Forget the bulk reports of a sampling session that has ended."""
        with self._lock:
            for stream in [key for key in self._streams if key[0] == sampling_session]:
                del self._streams[stream]

    def __len__(self) -> int:
        return len(self._table)

    def _make_room(self) -> None:
        """Drop fetched results that are old, then (only over the byte bound) the oldest results."""
        limit, now = self._limits.keep_results_bytes, self._clock()
        with self._lock:
            while self._delivered:
                pending = next(iter(self._delivered.values()))
                if (
                    now - pending.delivered_at < self._limits.keep_delivered_s
                    and self._bytes <= limit
                ):
                    break
                self._drop(pending)
            if self._bytes > limit:
                for pending in [p for p in self._table.values() if p.reply]:
                    if self._bytes <= limit:
                        break
                    self._drop(pending)

    def _drop(self, pending: Pending) -> None:
        self._table.pop(pending.request_id, None)
        if self._delivered.pop(pending.request_id, None) is not None:
            self._unreport(pending)
        if pending.reply is not None:
            self._bytes -= len(pending.reply.body)
