"""Who may enter? Keys, their owners, and the checks at the door.

Without a keys file one random key is made per start and belongs to the owner `local`. The door
looks at every request before a route does: the Host it names (a page that rebinds its DNS name to
this machine names its own host), the Origin a browser adds (a page elsewhere may not call us), the
key, and the size it announces.
"""

from __future__ import annotations

import hmac
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from course_lib.engine.limits import Limits
from course_lib.errors import CourseError

LOCAL_OWNER = "local"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/api/v1/healthz", "/api/v1/download/")  # downloads carry their proof in the URL


def new_key() -> str:
    """A key of the form that the SDK accepts."""
    return "tml-" + secrets.token_urlsafe(32)


def read_keys(file: str | Path) -> dict[str, str]:
    """A keys file, one learner a line: `NAME KEY`; returns key -> name."""
    path, owners = Path(file), {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise CourseError(str(file), f"cannot be read ({error})", "give a text file") from error
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or line.lstrip().startswith("#"):
            continue
        place = f"{file}:{number}"
        if len(words) != 2 or not words[0].replace("-", "").replace("_", "").isalnum():
            raise CourseError(place, "not a name and a key", "write: alice tml-...")
        name, key = words
        if not key.startswith("tml-") or len(key) < 20 or not key.isascii():
            raise CourseError(
                place,
                f"the key of {name} does not begin with tml- or is short",
                "write tml- and 32 random letters or digits",
            )
        if key in owners:
            raise CourseError(place, f"{name} has the same key as {owners[key]}", "give each a key")
        owners[key] = name
    if not owners:
        raise CourseError(str(file), "names no learner", "write a line per learner: alice tml-...")
    return owners


@dataclass(frozen=True)
class Access:
    """The keys that open the door, and the host names under which it stands."""

    owners: dict[str, str]  # key -> owner
    host: str = "127.0.0.1"

    def owner_of(self, key: str) -> str | None:
        """The key's owner. Every key is compared, each in constant time: timing tells nothing."""
        found = None
        for known, owner in self.owners.items():
            if hmac.compare_digest(known.encode(), key.encode("utf-8", "replace")):
                found = owner
        return found

    def knows_host(self, host: str) -> bool:
        """Whether a Host header names this server; only a server on loopback can tell."""
        if self.host not in LOOPBACK:
            return True
        return (urlsplit(f"//{host}").hostname or "") in LOOPBACK


class Door:
    """The ASGI app in front of the routes: who is let in gets `scope["owner"]`."""

    def __init__(self, app: Any, access: Access, limits: Limits) -> None:
        self._app, self._access, self._limits = app, access, limits

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        status, sentence = self._refusal(scope, dict(scope["headers"]))
        if status:
            await _send(send, status, sentence)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> tuple[int, str]:
        def text(name: bytes, default: str) -> str:
            return headers[name].decode("latin-1") if name in headers else default

        try:
            if not self._access.knows_host(text(b"host", "")):
                return 403, "This Host is not the engine's; call it as 127.0.0.1"
        except ValueError:
            return 403, "The Host header cannot be read"
        if b"origin" in headers or text(b"sec-fetch-site", "none") != "none":
            return 403, "Requests from browser pages are refused"
        length = text(b"content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.body_bytes:
            return 413, f"The body is larger than {self._limits.body_bytes} bytes"
        owner = self._access.owner_of(text(b"x-api-key", ""))
        if owner is None and not scope["path"].startswith(OPEN_PATHS):
            return 401, "The key in X-API-Key is unknown to this engine"
        scope["owner"] = owner or ""
        return 0, ""


async def _send(send: Any, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
