"""What happens at the URLs that ask about what was made? The half of the API behind `RestClient`.

The work is reading and moving files, so it runs in a thread and never holds up the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from pydantic import BaseModel
from starlette.responses import FileResponse
from tinker import types

from course_lib.engine import catalogue, search
from course_lib.engine.call import Call
from course_lib.engine.requests import RequestError


async def training_runs(call: Call) -> Any:
    limit, offset = call.number("limit", 20), call.number("offset", 0)
    project = call.request.query_params.get("project_id")
    return await asyncio.to_thread(
        catalogue.training_runs, call.rooms, call.owner, limit, offset, project
    )


async def training_run(call: Call) -> Any:
    return await asyncio.to_thread(catalogue.training_run, call.rooms, call.owner, call.path("run"))


async def run_checkpoints(call: Call) -> Any:
    return await asyncio.to_thread(
        catalogue.run_checkpoints, call.rooms, call.owner, call.path("run")
    )


async def all_checkpoints(call: Call) -> Any:
    limit, offset = call.number("limit", 100), call.number("offset", 0)
    return await asyncio.to_thread(catalogue.all_checkpoints, call.rooms, call.owner, limit, offset)


async def delete_checkpoint(call: Call) -> Any:
    path = call.checkpoint_path()
    return await asyncio.to_thread(catalogue.delete_checkpoint, call.rooms, call.owner, path)


async def publish(call: Call) -> Any:
    path = call.checkpoint_path()
    return await asyncio.to_thread(catalogue.publish, call.rooms, call.owner, path, True)


async def unpublish(call: Call) -> Any:
    path = call.checkpoint_path()
    return await asyncio.to_thread(catalogue.publish, call.rooms, call.owner, path, False)


class SetTtl(BaseModel):
    ttl_seconds: int | None = None


async def set_ttl(call: Call) -> Any:
    path, message = call.checkpoint_path(), await call.json(SetTtl)
    return await asyncio.to_thread(
        catalogue.set_ttl, call.rooms, call.owner, path, message.ttl_seconds
    )


async def external_weights_urls(call: Call) -> Any:
    path = call.checkpoint_path()
    return await asyncio.to_thread(
        catalogue.download_urls, call.rooms, call.owner, path, call.base_url
    )


async def download(call: Call) -> Any:
    query = call.request.query_params
    file = await asyncio.to_thread(
        catalogue.download,
        call.rooms,
        call.checkpoint_path(),
        call.path("file"),
        query.get("expires", ""),
        query.get("token", ""),
    )
    return FileResponse(file)


class WeightsInfo(BaseModel):
    tinker_path: str


async def weights_info(call: Call) -> Any:
    message = await call.json(WeightsInfo)
    return await asyncio.to_thread(
        catalogue.weights_info, call.rooms, call.owner, message.tinker_path
    )


async def copy_weights(call: Call) -> Any:
    message = await call.json(types.CopyWeightsRequest)
    headers, copies = call.request.headers, call.rooms.copies
    # Sent again while the first is still at it, or after it, the call gets the first one's copy.
    key = (call.owner, headers.get("x-idempotency-key") or secrets.token_hex(16))
    token = headers.get("x-tinker-weights-access-token")  # where the SDK puts it
    if key not in copies:
        readers = call.readers(token or message.weights_access_token)
        work = asyncio.to_thread(catalogue.copy_weights, call.rooms, call.owner, message, readers)
        copies[key] = asyncio.create_task(work)
        while len(copies) > 1000:
            copies.pop(next(iter(copies)))
    try:
        return {"tinker_path": await asyncio.shield(copies[key])}
    except Exception:
        copies.pop(key, None)  # one that failed may be tried again
        raise


async def sessions(call: Call) -> Any:
    limit, offset = call.number("limit", 20), call.number("offset", 0)
    return await asyncio.to_thread(search.session_list, call.rooms, call.owner, limit, offset)


async def session(call: Call) -> Any:
    return await asyncio.to_thread(
        search.session_info, call.rooms, call.owner, call.path("session")
    )


async def search_sessions(call: Call) -> Any:
    message = await call.json(types.SessionSearchRequest)
    return await asyncio.to_thread(search.search_sessions, call.rooms, call.owner, message)


async def trace_export(call: Call) -> Any:
    record = await asyncio.to_thread(
        search.visible_session, call.rooms, call.owner, call.path("session")
    )
    place = f"traces/{record.session_id}.pftrace"
    return {"status": "ready", "url": call.rooms.signer.url(call.base_url, place)}


async def trace(call: Call) -> Any:
    query, session_id = call.request.query_params, call.path("session")
    place = f"traces/{session_id}.pftrace"
    call.rooms.signer.check(place, query.get("expires", ""), query.get("token", ""))
    return call.rooms.worker.trace.export(session_id)


async def storage_usage(call: Call) -> Any:
    project = call.request.query_params.get("project_id")
    return await asyncio.to_thread(catalogue.storage_usage, call.rooms, call.owner, project)


async def hosted_only(call: Call) -> Any:
    raise RequestError("Bills and audit logs are hosted Tinker's; this engine keeps none")


async def session_project(call: Call) -> Any:
    raise RequestError("Projects are a matter of hosted Tinker; this engine has none to move to")
