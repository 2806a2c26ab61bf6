"""How do the SDK's calls reach the engine in this process? With less ado than a service far away.

The SDK builds its requests with httpx and sends them over pyqwest. Both are made for the internet:
cookies, proxies, redirects and defaults are asked about at every call, and every byte goes through
the threads of another runtime. That is 30 to 40 % of what a call costs, on the cores that the
engine should compute with. The SDK takes any `httpx.AsyncClient` in the place of its own; this one
makes the same requests and sends them as they are, over connections that stay open.

It is meant for the one server that it knows, and leaves out what that never does: TLS, HTTP/2,
redirects, bodies that are read bit by bit. `httptools` parses what comes back, as it does for
uvicorn on the other side.
"""

from __future__ import annotations

import asyncio
from json import dumps
from typing import TYPE_CHECKING, Any, NamedTuple

import httptools
import httpx

if TYPE_CHECKING:
    from tinker.lib.internal_client_holder import InternalClientHolder

TIMEOUT = httpx.Timeout(60, connect=5)  # as the SDK's own client has it


def prefer_loopback(holder: InternalClientHolder) -> None:
    """Let an SDK connection use a `LoopbackClient`; where its insides differ, nothing happens.

    Connections that are open already, as that of the session's heartbeat, stay what they are.
    """
    arguments = getattr(holder, "_constructor_kwargs", None)  # of every AsyncTinker to come
    if isinstance(arguments, dict):
        arguments.setdefault("http_client", LoopbackClient())


class LoopbackClient(httpx.AsyncClient):
    """An `httpx.AsyncClient` as far as the SDK uses one: it builds requests and sends them."""

    def __init__(self) -> None:
        # Its own transport would load certificates, and is never used.
        super().__init__(transport=httpx.AsyncBaseTransport(), timeout=TIMEOUT, trust_env=False)
        self._idle: list[Connection] = []

    def build_request(
        self,
        method: str,
        url: Any,
        *,
        json: Any = None,
        content: bytes | None = None,
        timeout: Any = TIMEOUT,
        extensions: dict[str, Any] | None = None,
        **parts: Any,
    ) -> httpx.Request:
        """A request of these parts and no others: no cookies, no defaults, no address to merge.

        The SDK itself says what type a body has; its length and the host are added by `written`.
        """
        timeout = timeout if isinstance(timeout, httpx.Timeout) else httpx.Timeout(timeout)
        extensions = {**(extensions or {}), "timeout": timeout.as_dict()}
        body = content or b""
        if json is not None:
            body = dumps(json, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        wanted = {name: part for name, part in parts.items() if part}
        return httpx.Request(
            method, url, stream=httpx.ByteStream(body), extensions=extensions, **wanted
        )

    async def send(self, request: httpx.Request, *, auth: Any = None, **_: Any) -> httpx.Response:
        """The whole answer, its body included, even where a stream was asked for.

        Raises:
            httpx.TransportError: nobody answers there, not in time, or not in HTTP.
        """
        if not isinstance(auth, httpx.Auth):
            return await self._ask(request)
        steps = auth.async_auth_flow(request)
        try:
            request = await anext(steps)
            while True:
                response = await self._ask(request)
                try:
                    request = await steps.asend(response)
                except StopAsyncIteration:
                    return response
        finally:
            await steps.aclose()

    async def aclose(self) -> None:
        while self._idle:
            self._idle.pop().close()
        await super().aclose()

    async def _ask(self, request: httpx.Request) -> httpx.Response:
        limits = request.extensions["timeout"]
        connection = await self._connection(request.url, limits["connect"])
        try:
            answer = await connection.ask(written(request), limits["read"])
        except BaseException as error:  # or given up: the answer may still come, to nobody
            connection.close()
            if isinstance(error, httpx.RequestError):
                error.request = request
            raise
        if answer.keeps_open and not self.is_closed:
            self._idle.append(connection)
        else:
            connection.close()
        return httpx.Response(
            answer.status, headers=answer.headers, content=answer.body, request=request
        )

    async def _connection(self, url: httpx.URL, timeout_s: float | None) -> Connection:
        while self._idle:
            connection = self._idle.pop()  # the one used last: it is the warmest
            if connection.open:
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(Connection, url.host, url.port or 80)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return connection


class Answer(NamedTuple):
    """A response as it came."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    keeps_open: bool


class Connection(asyncio.Protocol):
    """An open connection: one request, its answer, then the next."""

    def __init__(self) -> None:
        self.open = False
        self._answer: asyncio.Future[Answer] | None = None

    def ask(self, request: bytes, timeout_s: float | None) -> asyncio.Future[Answer]:
        """Send a request; the answer, or an httpx.TransportError."""
        loop = asyncio.get_running_loop()
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self._answer = answer = loop.create_future()
        if not self.open:  # closed since it was found idle
            self.connection_lost(None)
            return answer
        self._transport.write(request)
        if timeout_s is not None:
            timer = loop.call_later(timeout_s, self._fail, httpx.ReadTimeout("no answer in time"))
            answer.add_done_callback(lambda _: timer.cancel())
        return answer

    def close(self) -> None:
        self.open = False
        self._transport.close()

    def _fail(self, error: httpx.TransportError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    # What asyncio calls -------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self._transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(httpx.RemoteProtocolError(str(error)))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._fail(httpx.ReadError(str(exc or "the connection was closed")))

    # What the parser calls ----------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None  # an idle connection keeps no answer in memory
        headers, body = self._headers, b"".join(self._body)
        self._headers, self._body = [], []
        if answer is not None and not answer.done():
            status, stays = self._parser.get_status_code(), self._parser.should_keep_alive()
            answer.set_result(Answer(status, headers, body, stays))


def written(request: httpx.Request) -> bytes:
    """A request as it goes out: first line, headers, body."""
    body = request.read()
    lines = [
        b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path),
        b"Host: %s" % request.url.netloc,
        b"Content-Length: %d" % len(body),
        *[b"%s: %s" % header for header in request.headers.raw],
    ]
    return b"\r\n".join([*lines, b"", body])
