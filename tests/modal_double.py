"""A stand-in for Modal's servers: the gRPC calls that `modal deploy` makes, and what they carried.

The real modal client builds the app, its image, volume and secret against it, so a test reads what
Modal would have been told. Nothing is run: no image is built, no container started.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from google.protobuf import empty_pb2
from grpclib import GRPCError, Status
from grpclib.server import Server
from modal_proto import api_grpc, api_pb2


class ModalDouble:
    """Remembers every request by the name of its call, and answers with made-up ids."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []

    def of(self, call: str) -> list[Any]:
        """The requests of one call, in order."""
        return [message for name, message in self.requests if name == call]

    def servicer(self) -> api_grpc.ModalClientBase:
        """A servicer that knows the calls below and refuses every other one by name."""
        names = api_grpc.ModalClientBase.__abstractmethods__
        methods = {name: self._method(name) for name in names}
        return type("Servicer", (api_grpc.ModalClientBase,), methods)()

    def _method(self, name: str) -> Any:
        async def answer(servicer: Any, stream: Any) -> None:
            message = await stream.recv_message()
            self.requests.append((name, message))
            if name not in ANSWERS:
                raise GRPCError(Status.UNIMPLEMENTED, f"the double does not know {name}")
            for reply in ANSWERS[name](message):
                await stream.send_message(reply)

        return answer


def _function(message: Any) -> list[Any]:
    """A function as Modal gives it back: the definition itself, and where it can be reached."""
    function = message.function
    url = "https://ada--posttrain-serve.modal.run"
    handle = api_pb2.FunctionHandleMetadata(
        function_name=function.function_name, function_type=function.function_type, web_url=url
    )
    ranked = api_pb2.FunctionData.RankedFunction(rank=0, function=function)
    data = api_pb2.FunctionData(
        module_name=function.module_name,
        function_name=function.function_name,
        ranked_functions=[ranked],
        web_url=url,
    )
    reply = api_pb2.FunctionCreateResponse(
        function_id="fu-1", function=function, handle_metadata=handle, function_data=data
    )
    return [reply]


def _image_done(message: Any) -> list[Any]:
    success = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)
    return [api_pb2.ImageJoinStreamingResponse(result=success)]


ANSWERS: dict[str, Any] = {
    "ClientHello": lambda m: [api_pb2.ClientHelloResponse()],
    "AuthTokenGet": lambda m: [
        api_pb2.AuthTokenGetResponse(token="e30.eyJleHAiOjk5OTk5OTk5OTl9.x")
    ],
    "EnvironmentGetOrCreate": lambda m: [
        api_pb2.EnvironmentGetOrCreateResponse(
            environment_id="en-1",
            metadata=api_pb2.EnvironmentMetadata(
                name="main", settings=api_pb2.EnvironmentSettings(image_builder_version="2025.06")
            ),
        )
    ],
    "AppGetOrCreate": lambda m: [api_pb2.AppGetOrCreateResponse(app_id="ap-1")],
    "AppCreate": lambda m: [api_pb2.AppCreateResponse(app_id="ap-1")],
    "AppGetByDeploymentName": lambda m: [api_pb2.AppGetByDeploymentNameResponse()],
    "AppGetLayout": lambda m: [api_pb2.AppGetLayoutResponse()],
    "AppGetLogs": lambda m: [api_pb2.TaskLogsBatch(app_done=True)],
    "AppSetTags": lambda m: [empty_pb2.Empty()],
    "AppHeartbeat": lambda m: [empty_pb2.Empty()],
    "AppPublish": lambda m: [api_pb2.AppPublishResponse(url="https://modal.com/apps/posttrain")],
    "AppClientDisconnect": lambda m: [empty_pb2.Empty()],
    "MountBatchedCheckExistence": lambda m: [api_pb2.MountBatchedCheckExistenceResponse()],
    "MountPutFile": lambda m: [api_pb2.MountPutFileResponse(exists=True)],
    "MountGetOrCreate": lambda m: [api_pb2.MountGetOrCreateResponse(mount_id="mo-1")],
    "ImageGetOrCreate": lambda m: [
        api_pb2.ImageGetOrCreateResponse(
            image_id="im-1",
            result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS),
        )
    ],
    "ImageJoinStreaming": _image_done,
    "VolumeGetOrCreate": lambda m: [
        api_pb2.VolumeGetOrCreateResponse(volume_id="vo-1", version=m.version)
    ],
    "VolumePutFiles": lambda m: [empty_pb2.Empty()],
    "SecretGetOrCreate": lambda m: [api_pb2.SecretGetOrCreateResponse(secret_id="st-1")],
    "FunctionPrecreate": lambda m: [api_pb2.FunctionPrecreateResponse(function_id="fu-1")],
    "FunctionCreate": _function,
}


@contextlib.contextmanager
def modal_serving(double: ModalDouble) -> Iterator[str]:
    """Serve the double from a thread; yields its URL."""
    loop = asyncio.new_event_loop()
    ready: threading.Event = threading.Event()
    found: list[int] = []
    stop = asyncio.Event()

    async def run() -> None:
        server = Server([double.servicer()])
        await server.start("127.0.0.1", 0)
        found.append(server._server.sockets[0].getsockname()[1])  # type: ignore[union-attr]
        ready.set()
        await stop.wait()
        server.close()
        await server.wait_closed()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(10), "the double did not start"
    try:
        yield f"http://127.0.0.1:{found[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
