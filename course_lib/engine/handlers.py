"""What happens at each URL? Connecting, training, sampling, and fetching results.

Training requests are answered with the id of a future; `retrieve_future` holds the question until
the future is done, so that a client asks once or twice and not a thousand times.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from tinker import types
from tinker.types.future_retrieve_request import FutureRetrieveRequest
from tinker.types.futures_retrieve_request import FuturesRetrieveRequest
from tinker.types.join_sampling_session_request import JoinSamplingSessionRequest
from tinker.types.sample_request import SampleRequest as SampleMessage
from tinker.types.session_heartbeat_request import SessionHeartbeatRequest

from course_lib.engine import sampling, saving, search, training
from course_lib.engine.call import Call
from course_lib.engine.protobuf import read_envelope
from course_lib.engine.requests import RequestError
from course_lib.engine.wire import JSON_TYPE, json_reply, read_json

DYNAMIC_CONFIG = {"refresh_interval_sec": 3600, "sample_cancel_enabled": True}
GONE = (
    "The result is gone: it was fetched long ago, or had to make room. Send a sample call again; a "
    "training call has run. If the engine was started anew, connect again and load a checkpoint"
)


def refusal(status: int, sentence: str) -> Response:
    return Response(json_reply({"error": sentence}).body, status, media_type=JSON_TYPE)


# Connecting -------------------------------------------------------------------------------------


async def healthz(call: Call) -> Any:
    return {"status": "ok"}


async def client_config(call: Call) -> Any:
    return call.settings.client_config


async def dynamic_config(call: Call) -> Any:
    return DYNAMIC_CONFIG


async def capabilities(call: Call) -> Any:
    """The models by every name; `tokenizer_id` is an extra that the SDK ignores."""
    return {
        "supported_models": [
            {
                "model_name": name,
                "max_context_length": model.base.context_length,
                "trainable": True,
                "sampleable": True,
                "tokenizer_id": model.tokenizer_id,
            }
            for name, model in call.rooms.models.items()
        ]
    }


async def create_session(call: Call) -> Any:
    message = await call.json(types.CreateSessionRequest)
    return {"session_id": call.rooms.sessions.create(call.owner, message).session_id}


async def session_heartbeat(call: Call) -> Any:
    message = await call.json(SessionHeartbeatRequest)
    call.rooms.sessions.live(message.session_id, call.owner)
    call.rooms.end_silent_sessions()
    return {"type": "session_heartbeat"}


class FinishSession(BaseModel):
    reason: dict[str, str]
    detail: str | None = None


async def finish_session(call: Call) -> Any:
    message = await call.json(FinishSession)
    record = search.visible_session(call.rooms, call.owner, call.path("session"))
    reason = message.reason.get("type", "success")
    if reason not in ("success", "errored", "interrupted"):
        raise RequestError(f"reason.type is {reason[:40]!r}; use success, errored or interrupted")
    status = {"type": "client_finished", "reason": {"type": reason}, "detail": message.detail}
    call.rooms.end_session(record.session_id, status)
    return None


async def telemetry(call: Call) -> Any:
    await call.body()
    return {"status": "accepted"}  # read and thrown away


# Training ---------------------------------------------------------------------------------------


def future_of(request_id: str) -> dict[str, str]:
    return {"request_id": request_id}


async def in_line(call: Call, message_type: type[BaseModel], function: Callable[..., str]) -> Any:
    """Read a training request and put it into its run's line, even when it cannot be read."""
    body = await call.body()
    try:
        message = read_json(body, message_type)
    except RequestError as error:
        return future_of(training.refuse(call.rooms, call.owner, body, error))
    return future_of(function(call.rooms, call.owner, message))


async def create_model(call: Call) -> Any:
    message = await call.json(types.CreateModelRequest)
    return future_of(training.create_model(call.rooms, call.owner, message))


class GetInfo(BaseModel):
    model_id: str


async def get_info(call: Call) -> Any:
    message = await call.json(GetInfo)
    return training.get_info(call.rooms, call.owner, message.model_id)


async def forward_backward(call: Call) -> Any:
    message = read_envelope(await call.body())
    return future_of(training.forward_backward(call.rooms, call.owner, message))


async def optim_step(call: Call) -> Any:
    return await in_line(call, types.OptimStepRequest, training.optim_step)


async def load_weights(call: Call) -> Any:
    message = await call.json(types.LoadWeightsRequest)
    readers = call.readers(message.weights_access_token)
    return future_of(saving.load_weights(call.rooms, call.owner, message, readers))


async def save_weights(call: Call) -> Any:
    return await in_line(call, types.SaveWeightsRequest, saving.save_weights)


async def save_weights_for_sampler(call: Call) -> Any:
    return await in_line(call, types.SaveWeightsForSamplerRequest, saving.save_weights_for_sampler)


async def save_weights_external(call: Call) -> Any:
    return await in_line(call, types.SaveWeightsExternalRequest, saving.save_weights_external)


async def create_custom_loss(call: Call) -> Any:
    await call.body()
    raise RequestError(
        "This engine runs custom losses in the client; leave custom_loss_server_side off"
    )


# Sampling ---------------------------------------------------------------------------------------


async def create_sampling_session(call: Call) -> Any:
    message = await call.json(types.CreateSamplingSessionRequest)
    sampler_id = sampling.create_sampling_session(call.rooms, call.owner, message)
    return {"sampling_session_id": sampler_id, "type": "create_sampling_session"}


async def join_sampling_session(call: Call) -> Any:
    message = await call.json(JoinSamplingSessionRequest)
    session = call.rooms.samplers.get(message.sampling_session_id, call.owner)
    return {"client_counter": call.rooms.samplers.join(session), "type": "join_sampling_session"}


async def get_sampler(call: Call) -> Any:
    session = call.rooms.samplers.get(call.path("sampler"), call.owner)
    return {
        "sampler_id": session.sampler_id,
        "base_model": session.model.name,
        "model_path": session.model_path,
    }


async def asample(call: Call) -> Any:
    message = await call.json(SampleMessage)
    accepted = sampling.asample(call.rooms, call.owner, message)
    if accepted is None:
        return refusal(429, "Too many samples are waiting; come back in a second")
    request_id, samples = accepted
    sequence_ids = [f"{request_id}:{index}" for index in range(samples)]
    return {"request_id": request_id, "sample_sequence_ids": sequence_ids}


# Results ----------------------------------------------------------------------------------------


class LoopEvent:
    """An event of the running event loop that any thread may set."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future = self._loop.create_future()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._resolve)

    async def wait(self, timeout_s: float) -> None:
        await asyncio.wait([self._future], timeout=timeout_s)

    def _resolve(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


async def retrieve_future(call: Call) -> Any:
    """Hold the question until the answer is there, 40 s at most; then 408, "ask again"."""
    message = await call.json(FutureRetrieveRequest)
    futures = call.rooms.futures
    pending = futures.find(message.request_id, call.owner)
    if pending is None:
        return refusal(410, GONE)
    pending.ask()
    there = LoopEvent()
    pending.when_settled(there.set)
    await there.wait(call.rooms.limits.hold_s)
    if pending.reply is None:
        pending.unlisten(there.set)
        again = {"type": "try_again", "request_id": pending.request_id, "queue_state": "active"}
        return Response(json_reply(again).body, 408, media_type=JSON_TYPE)
    futures.delivered(pending)
    return pending.reply


async def retrieve_futures(call: Call) -> Any:
    """Which of one sampling client's requests have finished; the results are fetched one by one."""
    message = await call.json(FuturesRetrieveRequest)
    target, futures = message.target, call.rooms.futures
    session = call.rooms.samplers.get(target.sampling_session_id, call.owner)
    stream = (session.sampler_id, target.cloned_sampler_id)
    futures.forget(message.retrieved_request_ids, call.owner)
    hold_s = call.rooms.limits.bulk_hold_s
    hold_s = hold_s if message.timeout is None else max(0.0, min(message.timeout, hold_s))
    one_more = LoopEvent()
    futures.listen(stream, one_more.set)  # before looking, so that nothing slips between
    finished = futures.completions(stream, message.prev_cursor)
    if not finished and hold_s:
        await one_more.wait(hold_s)
        finished = futures.completions(stream, message.prev_cursor)
    futures.unlisten(stream, one_more.set)
    completions = [
        {"state": "failed", "request_id": request_id}
        if failed
        else {
            "state": "finished",
            "request_id": request_id,
            "response_payload_uncompressed_size": size,
        }
        for _, request_id, failed, size in finished
    ]
    return {
        "completions": completions,
        "cursor": finished[-1][0] if finished else message.prev_cursor,
    }


class CancelFuture(BaseModel):
    request_id: str


async def cancel_future(call: Call) -> Any:
    """The client has given the request up."""
    message = await call.json(CancelFuture)
    call.rooms.futures.cancel(message.request_id, call.owner)
    return None
