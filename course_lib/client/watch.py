"""Does the server still answer? Somebody has to say when it does not.

Without a word the SDK sends a call again for five minutes, and asks for a result that is due for as
long as the process lives. A server that was killed, or Wi-Fi that is gone, looks like slow work.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from weakref import WeakSet

import httpx

from course_lib.client.probe import is_loopback

ANSWER_S = 5.0  # for one answer

_lock = threading.Lock()
_watched: dict[str, WeakSet[object]] = {}  # by URL: the service clients that call it


@dataclass(frozen=True)
class Pace:
    """Seconds between two looks, while answers come and while none does; and until that is told."""

    every_s: float = 10.0
    again_s: float = 2.0
    patience_s: float = 15.0


def watch(url: str, client: object, pace: Pace | None = None) -> None:
    """Say on stderr when the server falls silent and when it answers again, while `client` lives.

    One thread looks for all clients of a URL.
    """
    with _lock:
        first = url not in _watched
        _watched.setdefault(url, WeakSet()).add(client)
    if first:
        name = f"course-watch {url}"
        threading.Thread(target=_look, args=(url, pace or Pace()), name=name, daemon=True).start()


def leave(url: str, client: object) -> None:
    """This client will not call any more."""
    with _lock:
        _watched.get(url, WeakSet()).discard(client)


def leave_all() -> None:
    """No client here will call any more, wherever it called: servers may end without a word."""
    with _lock:
        for clients in _watched.values():
            clients.clear()


def _look(url: str, pace: Pace) -> None:
    answered_at, told, pause_s = time.monotonic(), False, pace.every_s
    with httpx.Client(timeout=ANSWER_S, trust_env=not is_loopback(url)) as http:
        while True:
            time.sleep(pause_s)
            with _lock:
                if not _watched[url]:
                    del _watched[url]
                    return
            answers = _answers(http, url)
            silent_s = time.monotonic() - answered_at
            if answers:
                if told:
                    _say(f"{url}: answers again, after {silent_s:.0f} s")
                answered_at, told, pause_s = time.monotonic(), False, pace.every_s
                continue
            pause_s = pace.again_s
            if not told and silent_s >= pace.patience_s:
                told = True
                _say(
                    f"{url}: no answer for {silent_s:.0f} s; calls wait until it answers again. "
                    "Is the server running, and the network there? Ctrl-C (in a notebook: "
                    "Interrupt) ends the waiting"
                )


def _answers(http: httpx.Client, url: str) -> bool:
    """Somebody answers, whatever it is; a proxy that finds nobody behind it does not count."""
    try:
        return http.get(f"{url}/api/v1/healthz").status_code < 500
    except httpx.HTTPError:
        return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
