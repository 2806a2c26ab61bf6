"""Which back end, and why? Decided from arguments, environment and `.env`; nothing is called yet.

The order: the argument, COURSE_BACKEND, TINKER_BASE_URL, TINKER_API_KEY, else the embedded engine.
The SDK's stored login (~/.tinker/credentials.json) never decides: what costs money is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from course_lib.dotenv import setting
from course_lib.errors import CourseError

Backend = Literal["embedded", "hosted", "url"]


@dataclass(frozen=True)
class Choice:
    """Where the calls will go, and the reason in words."""

    backend: Backend
    reason: str
    url: str | None = None  # for backend "url"


def choose(backend: str | None = None) -> Choice:
    """Decide where calls go, in the order that the module describes."""
    named, source = backend, f"backend={backend!r}"
    if not named:
        named, source = setting("COURSE_BACKEND"), "COURSE_BACKEND is set"
    if named:
        return _named(named, source)
    if url := setting("TINKER_BASE_URL"):
        return Choice("url", "TINKER_BASE_URL is set", checked_url(url, "TINKER_BASE_URL"))
    if setting("TINKER_API_KEY"):
        return Choice("hosted", "TINKER_API_KEY is set")
    return Choice("embedded", "no TINKER_BASE_URL, no TINKER_API_KEY")


def _named(name: str, source: str) -> Choice:
    if name == "embedded":
        return Choice("embedded", source)
    if name == "hosted":
        return Choice("hosted", source)
    return Choice("url", source, checked_url(name, source))


def checked_url(url: str, place: str) -> str:
    """The URL without its trailing slash.

    Raises:
        CourseError: it is not an http or https address.
    """
    if not _is_address(url):
        raise CourseError(
            place,
            f"{url!r} is not a back end",
            "use embedded, hosted, or a URL like http://host:port",
        )
    return url.rstrip("/")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        reachable = bool(parts.hostname) and parts.port != 0  # the port is read and checked here
    except ValueError:
        return False
    return reachable and parts.scheme in ("http", "https") and len(url.split()) == 1
