"""Which URL? The routes of the Tinker API that the SDK calls, and nothing else.

A person's mistake is a 4xx with one sentence; nothing here answers 5xx, which the SDK would repeat
for minutes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from course_lib.engine import handlers, listing
from course_lib.engine.access import Access, Door
from course_lib.engine.call import Call, Settings
from course_lib.engine.handlers import refusal
from course_lib.engine.limits import Limits
from course_lib.engine.requests import NotFoundError, RequestError
from course_lib.engine.rooms import Rooms
from course_lib.engine.sessions import EndedError
from course_lib.engine.wire import Reply, json_reply

log = logging.getLogger(__name__)
Handler = Callable[[Call], Awaitable[Any]]
Endpoint = Callable[[Request], Awaitable[Response]]

# What the SDK is told to do. Each sample in flight holds two sockets of this one process, one at
# either end, so their number stays below what a system allows (256 files on macOS). A watchdog for
# each sample, which speaks after two hours, costs a tenth of what the SDK does for it. And a batch
# is not cut into requests while `Limits` allows: of several one may fail alone, and the others'
# gradients would stay.
CLIENT_CONFIG = {
    "sample_max_concurrent_requests": 96,
    "sample_enable_stuck_detection": False,
    "fwdbwd_max_chunk_len": Limits.data_per_request,
    "fwdbwd_max_chunk_bytes_count": 48_000_000,  # less than the 50 that it sends at once
}

CHECKPOINT = "training_runs/{run}/checkpoints/{kind}/{name}"
ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "healthz", handlers.healthz),
    ("POST", "client/config", handlers.client_config),
    ("POST", "client/dynamic_config", handlers.dynamic_config),
    ("GET", "get_server_capabilities", handlers.capabilities),
    ("POST", "create_session", handlers.create_session),
    ("POST", "session_heartbeat", handlers.session_heartbeat),
    ("POST", "sessions/{session}/finish", handlers.finish_session),
    ("POST", "telemetry", handlers.telemetry),
    ("POST", "create_model", handlers.create_model),
    ("POST", "get_info", handlers.get_info),
    ("POST", "forward_backward", handlers.forward_backward),
    ("POST", "optim_step", handlers.optim_step),
    ("POST", "save_weights", handlers.save_weights),
    ("POST", "load_weights", handlers.load_weights),
    ("POST", "save_weights_for_sampler", handlers.save_weights_for_sampler),
    ("POST", "save_weights_external", handlers.save_weights_external),
    ("POST", "create_custom_loss", handlers.create_custom_loss),
    ("POST", "create_sampling_session", handlers.create_sampling_session),
    ("POST", "join_sampling_session", handlers.join_sampling_session),
    ("GET", "samplers/{sampler}", handlers.get_sampler),
    ("POST", "asample", handlers.asample),
    ("POST", "retrieve_future", handlers.retrieve_future),
    ("POST", "retrieve_futures", handlers.retrieve_futures),
    ("POST", "cancel_future", handlers.cancel_future),
    ("GET", "training_runs", listing.training_runs),
    ("GET", "training_runs/{run}", listing.training_run),
    ("GET", "training_runs/{run}/checkpoints", listing.run_checkpoints),
    ("GET", "checkpoints", listing.all_checkpoints),
    ("DELETE", CHECKPOINT, listing.delete_checkpoint),
    ("POST", f"{CHECKPOINT}/publish", listing.publish),
    ("DELETE", f"{CHECKPOINT}/publish", listing.unpublish),
    ("PUT", f"{CHECKPOINT}/ttl", listing.set_ttl),
    ("GET", f"{CHECKPOINT}/external_weights_urls", listing.external_weights_urls),
    ("GET", "download/{run}/{kind}/{name}/{file}", listing.download),
    ("GET", "sessions/{session}/trace_export", listing.trace_export),
    ("GET", "download/traces/{session}.pftrace", listing.trace),
    ("POST", "weights_info", listing.weights_info),
    ("POST", "copy_weights", listing.copy_weights),
    ("POST", "sessions/search", listing.search_sessions),
    ("GET", "sessions", listing.sessions),
    ("GET", "sessions/{session}", listing.session),
    ("GET", "billing/usage/checkpoints/current", listing.storage_usage),
    ("GET", "billing/usage/events", listing.hosted_only),
    ("GET", "audit", listing.hosted_only),
    ("PUT", "sessions/{session}/project", listing.session_project),
]


def create_app(rooms: Rooms, access: Access, client_config: dict[str, Any] | None = None) -> Door:
    """The ASGI app: the door, then the routes."""
    settings = Settings(access, CLIENT_CONFIG | (client_config or {}))
    endpoints = {
        (method, f"/api/v1/{path}"): endpoint(handler, rooms, settings)
        for method, path, handler in ROUTES
    }
    return Door(Routes(endpoints), access, rooms.limits)


class Routes:
    """From method and path to endpoint. Starlette tries one pattern after the other, which takes
    a third of a short request's time; a path without parameters is looked up instead."""

    def __init__(self, endpoints: dict[tuple[str, str], Endpoint]) -> None:
        self._looked_up = {key: to for key, to in endpoints.items() if "{" not in key[1]}
        self._patterns = Starlette(
            routes=[Route(path, to, methods=[method]) for (method, path), to in endpoints.items()],
            exception_handlers={404: no_route, 405: no_route},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        respond = self._looked_up.get((scope["method"], scope["path"]))
        if respond is None:
            await self._patterns(scope, receive, send)
        else:
            response = await respond(Request(scope, receive))
            await response(scope, receive, send)


def endpoint(handler: Handler, rooms: Rooms, settings: Settings) -> Endpoint:
    """Turn what the handler returns or raises into a response."""

    @functools.wraps(handler)
    async def respond(request: Request) -> Response:
        try:
            answer = await handler(Call(request, rooms, settings))
        except NotFoundError as error:
            return refusal(404, str(error))
        except EndedError as error:
            return refusal(410, str(error))
        except RequestError as error:
            return refusal(400, str(error))
        except ClientDisconnect:
            return refusal(400, "The client has gone")
        except Exception as error:
            log.exception("a handler failed")
            return refusal(400, f"The engine failed: {type(error).__name__}")
        if isinstance(answer, Response):
            return answer
        reply = answer if isinstance(answer, Reply) else json_reply(answer)
        return Response(reply.body, media_type=reply.content_type)

    return respond


async def no_route(request: Request, error: Exception) -> Response:
    return refusal(404, f"This engine has no {request.method} {request.url.path[:100]}")
