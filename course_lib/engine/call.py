"""What does a handler get? One HTTP request: its owner, body and parameters, checked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from course_lib.engine.access import Access
from course_lib.engine.names import TinkerPath, parse_path
from course_lib.engine.requests import RequestError
from course_lib.engine.rooms import Rooms
from course_lib.engine.wire import decompressed, read_json


class Settings:
    """What the app is told when it is made."""

    def __init__(self, access: Access, client_config: dict[str, Any]) -> None:
        self.access = access
        self.client_config = client_config  # flags for the SDK


class Call:
    """One HTTP request with what the handlers need."""

    def __init__(self, request: Request, rooms: Rooms, settings: Settings) -> None:
        self.request, self.rooms, self.settings = request, rooms, settings
        self.owner: str = request.scope["owner"]

    async def body(self) -> bytes:
        """The decompressed body, within the size limit even when no length was announced."""
        limit, parts, size = self.rooms.limits.body_bytes, [], 0
        async for part in self.request.stream():
            size += len(part)
            if size > limit:
                raise RequestError(f"The body is larger than {limit} bytes")
            parts.append(part)
        encoding = self.request.headers.get("content-encoding", "")
        return decompressed(b"".join(parts), encoding, limit)

    async def json(self, message_type: type[BaseModel]) -> Any:
        return read_json(await self.body(), message_type)

    @property
    def base_url(self) -> str:
        """The URL under which this client reaches us; the door has checked the host."""
        return f"http://{self.request.headers.get('host', '')}"

    def path(self, name: str) -> str:
        return self.request.path_params[name]

    def number(self, name: str, default: int) -> int:
        text = self.request.query_params.get(name, str(default))
        if not text.isdecimal() or len(text) > 9:
            raise RequestError(f"{name} is {text[:40]!r}; give a whole number from 0 to 999999999")
        return int(text)

    def checkpoint_path(self) -> TinkerPath:
        run, kind, name = self.path("run"), self.path("kind"), self.path("name")
        return parse_path(f"tinker://{run}/{kind}/{name}")

    def readers(self, token: str | None) -> tuple[str, ...]:
        """The owner behind a `weights_access_token`, whose checkpoints may be read, too."""
        owner = self.settings.access.owner_of(token) if token else None
        return () if owner is None else (owner,)
