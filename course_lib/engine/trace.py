"""When did what run? A session's requests on a time line, for https://ui.perfetto.dev."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

_EVENTS = 20_000  # over all sessions; older ones are forgotten


class Trace:
    """The last requests that were computed: for whom, what, from when to when."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: deque[tuple[str, str, float, float]] = deque(maxlen=_EVENTS)

    def add(self, track: str, what: str, started: float) -> None:
        """Note a request that has just ended; its track begins with the session's id."""
        with self._lock:
            self._events.append((track, what, started, time.time()))

    def export(self, session_id: str) -> dict[str, Any]:
        """The session's part in the Trace Event Format, times in microseconds."""
        with self._lock:
            events = [event for event in self._events if event[0].split(":")[0] == session_id]
        tracks = {
            track: index for index, track in enumerate(sorted({event[0] for event in events}))
        }
        labels: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": track}}
            for track, tid in tracks.items()
        ]
        return {
            "traceEvents": labels
            + [
                {
                    "ph": "X",
                    "name": what,
                    "pid": 1,
                    "tid": tracks[track],
                    "ts": started * 1e6,
                    "dur": (ended - started) * 1e6,
                }
                for track, what, started, ended in events
            ]
        }
