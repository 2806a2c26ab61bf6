"""Who is connected? One session per `ServiceClient`: its runs, its samplers, its heartbeat."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinker import types

from course_lib.engine.limits import Limits
from course_lib.engine.names import shown
from course_lib.engine.records import SessionRecord, iso, now
from course_lib.engine.requests import NotFoundError, RequestError
from course_lib.engine.storage import Store

log = logging.getLogger(__name__)


class EndedError(RequestError):
    """The session has finished; nothing more can be done in it."""


class Sessions:
    """The live sessions. Each change is written to the store, where ended ones stay listed."""

    def __init__(
        self, store: Store, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._limits, self._clock = store, limits, clock
        self._lock = threading.Lock()
        self._live: dict[str, SessionRecord] = {}
        self._heard: dict[str, float] = {}
        self._looked = clock()  # at who is silent, the last time

    def create(self, owner: str, message: types.CreateSessionRequest) -> SessionRecord:
        record = SessionRecord(
            session_id=secrets.token_hex(6),
            owner=owner,
            created_at=iso(now()),
            tags=message.tags,
            user_metadata=text_metadata(message.user_metadata, self._limits),
            project_id=message.project_id,
            display_name=message.display_name,
        )
        self._store.write_session(record)
        with self._lock:
            self._live[record.session_id] = record
            self._heard[record.session_id] = self._clock()
        return record

    def live(self, session_id: str, owner: str) -> SessionRecord:
        """The session, when it is this owner's and has not ended; a sign of life, too."""
        with self._lock:
            record = self._live.get(session_id)
            if record is not None and record.owner == owner:
                self._heard[session_id] = self._clock()
                return record
        known = len(session_id) <= 64 and session_id.isalnum() and self._store.session(session_id)
        if known and known.owner == owner:
            raise ended(session_id)
        raise NotFoundError(f"There is no session {shown(session_id)}")

    def add_run(self, session_id: str, run_id: str) -> None:
        with self._lock:  # to the end: else of two at once one would be lost, or written too late
            record = self._live.get(session_id)
            if record is not None:
                record = replace(record, training_run_ids=[*record.training_run_ids, run_id])
                self._live[session_id] = record
                self._store.write_session(record)

    def add_sampler(self, session_id: str, sampler_id: str) -> None:
        """Each snapshot is one, so its id is added to a file: the record would be written anew.

        Raises:
            EndedError: the session has ended, and nobody will free what the sampler holds.
        """
        with self._lock:
            if session_id not in self._live:
                raise ended(session_id)
            self._store.add_sampler(session_id, sampler_id)

    def end(self, session_id: str, status: dict[str, Any]) -> bool:
        """Finish the session; the first reason stays. Returns whether it was live."""
        with self._lock:
            record = self._live.pop(session_id, None)
            self._heard.pop(session_id, None)
            if record is None:
                return False
            try:
                self._store.write_session(replace(record, status=status))
            except RequestError as error:  # a full disk keeps no session alive
                log.warning("the session %s has ended, but: %s", session_id, error)
        return True

    def silent(self) -> list[str]:
        """Live sessions whose client has not been heard of for too long.

        Every heartbeat asks. Where none came for long - the laptop was asleep - all are silent, and
        the first to wake would end the others: their time begins anew.
        """
        now, silent_s = self._clock(), self._limits.silent_s
        with self._lock:
            if now - self._looked > silent_s / 2:
                self._heard = dict.fromkeys(self._heard, now)
            self._looked = now
            return [key for key, heard in self._heard.items() if heard < now - silent_s]


def ended(session_id: str) -> EndedError:
    return EndedError(f"The session {session_id} has ended; connect again")


def text_metadata(metadata: dict[str, Any] | None, limits: Limits) -> dict[str, str] | None:
    """A user's metadata as the SDK reads it back: text to text, bounded."""
    if metadata is None:
        return None
    texts = {
        str(key): value if isinstance(value, str) else str(value) for key, value in metadata.items()
    }
    if sum(len(key) + len(value) for key, value in texts.items()) > limits.metadata_bytes:
        raise RequestError(f"user_metadata is larger than {limits.metadata_bytes} characters")
    return texts
