"""Which URL? The routes, who may call them, and how large a call may be.

    GET  /health                 200 while the process lives
    GET  /ready                  200 when the model answers; 503 while it loads, and for good,
                                 with the reason, if it cannot be loaded
    GET  /v1/models              what is served
    POST /v1/chat/completions    the model's own chat template
    POST /v1/completions         plain text

Every /v1 call carries `Authorization: Bearer KEY`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from course_lib.engine.model import first_line
from course_lib.errors import CourseError
from course_lib.serve.decoder import ServedModel
from course_lib.serve.generate import Piece, collect, generate
from course_lib.serve.limits import ServeLimits
from course_lib.serve.protocol import ApiError, Generation, read_chat, read_completion
from course_lib.serve.replies import Writer

MIN_KEY = 8  # characters
log = logging.getLogger("posttrain.serve")


class Served:
    """What the routes share: the model once it is there, and how much is in flight."""

    def __init__(self, source: str | Path | ServedModel, limits: ServeLimits) -> None:
        self.source, self.limits = source, limits
        self.model: ServedModel | None = None
        self.failed: CourseError | None = None
        self.in_flight = 0
        if isinstance(source, ServedModel):
            self.use(source)

    def use(self, model: ServedModel) -> None:
        base = model.base
        self.limits = replace(self.limits, context=base.context_length, vocabulary=base.vocab_size)
        self.model = model

    async def load(self) -> None:
        """Read the model in a thread, so that /health answers meanwhile.

        Whatever goes wrong is kept for /ready: nobody else waits for this task.
        """
        assert not isinstance(self.source, ServedModel), "it is loaded already"
        try:
            self.use(await asyncio.to_thread(ServedModel.load, self.source))
        except CourseError as error:
            self.failed = error
            log.error("%s", error)
        except Exception as error:
            finding = f"loading failed ({type(error).__name__}: {first_line(error)})"
            remedy = "see the traceback on the server's stderr"
            self.failed = CourseError(str(self.source), finding, remedy)
            log.exception("%s", self.failed)

    def ready(self) -> ServedModel:
        if self.model is None:
            why = f"the model cannot be loaded: {self.failed}" if self.failed else "loading"
            raise ApiError(503, why, code="not_ready")
        return self.model

    @contextlib.contextmanager
    def room(self, choices: int):
        """Count a request's choices while it runs; refuse it when too many are running."""
        if self.in_flight + choices > self.limits.in_flight:
            raise ApiError(429, "too many requests at once; try again", code="rate_limit_exceeded")
        self.in_flight += choices
        try:
            yield
        finally:
            self.in_flight -= choices


def create_app(
    model: str | Path | ServedModel, key: str, limits: ServeLimits | None = None
) -> Starlette:
    """The ASGI app for a deploy folder, a model folder, or a model that is loaded already."""
    if len(key) < MIN_KEY:
        remedy = "set a longer one, or leave it out to have one made"
        raise CourseError("POSTTRAIN_API_KEY", f"shorter than {MIN_KEY} characters", remedy)
    served = Served(model, limits or ServeLimits())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = None if served.model else asyncio.create_task(served.load())
        yield
        if task:
            task.cancel()
            if served.model:  # loaded here; one that was handed in is its owner's to stop
                await asyncio.to_thread(served.model.stop)

    app = Starlette(
        routes=[
            Route("/health", lambda request: JSONResponse({"status": "ok"})),
            Route("/ready", _answer(served, _ready), methods=["GET"]),
            Route("/v1/models", _answer(served, _models), methods=["GET"]),
            Route("/v1/models/{name:path}", _answer(served, _one_model), methods=["GET"]),
            Route("/v1/chat/completions", _answer(served, _chat), methods=["POST"]),
            Route("/v1/completions", _answer(served, _completion), methods=["POST"]),
        ],
        lifespan=lifespan,
        exception_handlers={404: _not_found, 405: _not_found},
    )
    app.add_middleware(_Bearer, key=key)
    app.state.served = served
    return app


class _Bearer:
    """Lets a /v1 call pass with the key, compared in constant time."""

    def __init__(self, app: Callable, key: str) -> None:
        self.app, self.digest = app, hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ("/health", "/ready"):
            given = Request(scope).headers.get("authorization", "")
            scheme, _, key = given.partition(" ")
            digest = hashlib.sha256(key.strip().encode()).digest()
            if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self.digest):
                error = ApiError(401, "a valid API key is needed", code="invalid_api_key")
                headers = {"www-authenticate": "Bearer"}
                response = JSONResponse(error.body(), 401, headers)
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _answer(served: Served, handler: Callable) -> Callable:
    """A route that turns every ApiError into OpenAI's error body."""

    async def route(request: Request) -> Response:
        try:
            return await handler(served, request)
        except ApiError as error:
            headers = {"retry-after": "1"} if error.status in (429, 503) else None
            return JSONResponse(error.body(), error.status, headers)

    return route


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    found = ApiError(status, f"{request.method} {request.url.path} is not served here")
    return JSONResponse(found.body(), status)


async def _ready(served: Served, request: Request) -> Response:
    return JSONResponse({"status": "ready", "model": served.ready().name})


async def _models(served: Served, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(served.ready())]})


async def _one_model(served: Served, request: Request) -> Response:
    _check_model(served.ready(), request.path_params["name"])
    return JSONResponse(_described(served.ready()))


def _described(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "posttrain"}


def _check_model(model: ServedModel, name: object) -> None:
    if name != model.name:
        message = f"the model {str(name)[:80]!r} is not served here; there is {model.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


async def _chat(served: Served, request: Request) -> Response:
    model, body = served.ready(), await _body(served, request)
    return await _reply(served, request, read_chat(body, model.render, served.limits))


async def _completion(served: Served, request: Request) -> Response:
    model, body = served.ready(), await _body(served, request)
    return await _reply(served, request, read_completion(body, model.encode, served.limits))


async def _body(served: Served, request: Request) -> dict[str, Any]:
    """The request's JSON object, of bounded size, for the model that is served."""
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > served.limits.body_bytes:
            message = f"the body is larger than {served.limits.body_bytes} bytes"
            raise ApiError(413, message, code="request_too_large")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    if body.get("model") is None:
        raise ApiError(400, f"model is missing; there is {served.ready().name!r}", "model")
    _check_model(served.ready(), body["model"])
    return body


async def _reply(served: Served, request: Request, wanted: Generation) -> Response:
    model = served.ready()
    writer = Writer(model, wanted)
    if wanted.stream:
        pieces = generate(model, wanted)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(served.room(wanted.choices))
            # The first piece is awaited here: a request that fails at once gets a real status.
            first = await anext(pieces)
            held = stack.pop_all()
        held.push_async_callback(pieces.aclose)  # type: ignore[attr-defined]
        return _EventStream(_events(writer, first, pieces), held)
    with served.room(wanted.choices):
        work = asyncio.ensure_future(collect(model, wanted))
        gone = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()  # the caller is gone: stop decoding for nobody
            return Response(status_code=499)
        return JSONResponse(writer.whole(work.result()))


class _EventStream(StreamingResponse):
    """Server-sent events that let go of what they hold however they end, a lost caller included."""

    def __init__(self, events: AsyncIterator[bytes], held: contextlib.AsyncExitStack) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.held:
            await super().__call__(scope, receive, send)


async def _events(
    writer: Writer, first: Piece, pieces: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    """Server-sent events of one answer; an error in the middle becomes an event."""
    try:
        for event in writer.first_events():
            yield event
        yield writer.event(first)
        async for piece in pieces:
            yield writer.event(piece)
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n".encode()
    for event in writer.last_events():
        yield event


async def _disconnected(request: Request) -> None:
    """Returns when the caller has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
