"""What becomes of an exception? The answer of the request it belongs to, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable

from course_lib.engine.requests import RequestError
from course_lib.engine.wire import Reply, failure_reply

log = logging.getLogger(__name__)


def answer(work: Callable[[], Reply]) -> Reply:
    """The work's reply, or the failure that its exception stands for."""
    try:
        return work()
    except Exception as error:
        return reply_for(error)


def reply_for(error: Exception) -> Reply:
    """A person's mistake is told as it is; anything else is our mistake, and is logged."""
    if isinstance(error, RequestError):
        return failure_reply(str(error))
    log.error("a request failed inside the engine", exc_info=error)
    return failure_reply(f"The engine failed: {type(error).__name__}: {error}", "server")


def tried(work: Callable[[], None]) -> None:
    """Do something that nobody waits for; a failure is logged."""
    try:
        work()
    except Exception:
        log.exception("an errand on the compute thread failed")
