"""The SDK's calls to the embedded engine: less ado, understood and failing all the same."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fake_compute import fake_engine, fake_models
from loopback import free_port, serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from course_lib.client import choose
from course_lib.client.loopback import LoopbackClient, prefer_loopback
from course_lib.client.service import CourseService
from course_lib.engine.server import Engine


async def echo(request: Request) -> Response:
    """What arrived, so that a test can look at it."""
    body = await request.body()
    headers = [[name.decode(), value.decode()] for name, value in request.headers.raw]
    return JSONResponse(
        {"method": request.method, "query": request.url.query, "headers": headers, "n": len(body)},
        418 if "teapot" in request.url.path else 200,
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    routes = [Route(path, echo, methods=["GET", "POST"]) for path in ("/echo", "/teapot")]
    with serving(Starlette(routes=routes)) as url:
        yield url


def with_client(work: Callable[[LoopbackClient], Awaitable[object]]) -> object:
    async def run() -> object:
        async with LoopbackClient() as client:
            return await work(client)

    return asyncio.run(run())


def asked(url: str, method: str = "POST", **parts: object) -> httpx.Response:
    return with_client(lambda client: client.send(client.build_request(method, url, **parts)))  # type: ignore


@contextmanager
def answering(*pieces: bytes) -> Iterator[str]:
    """A server that reads a request, sends the pieces, and hangs up."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65_536)
                    for piece in pieces:
                        connection.sendall(piece)

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


def test_a_request_arrives_as_httpx_would_have_sent_it(url: str):
    headers = {"X-Mine": "1", "Content-Type": "application/json"}
    parts = {"json": {"a": "\N{SNOWMAN}"}, "params": {"q": "x y"}, "headers": headers}
    ours = asked(f"{url}/echo", **parts).json()
    theirs = httpx.post(f"{url}/echo", **parts).json()
    defaults = ("accept", "accept-encoding", "connection", "user-agent")  # the SDK brings its own
    theirs["headers"] = [each for each in theirs["headers"] if each[0] not in defaults]
    assert sorted(ours.pop("headers")) == sorted(theirs.pop("headers"))
    assert ours == theirs


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_bodies_of_every_size_arrive_whole(url: str, size: int):
    assert asked(f"{url}/echo", content=b"x" * size).json()["n"] == size


def test_an_answer_that_refuses_is_an_answer(url: str):
    response = asked(f"{url}/teapot", "GET")
    assert response.status_code == 418
    with pytest.raises(httpx.HTTPStatusError):
        response.raise_for_status()


def test_a_connection_serves_one_request_after_the_other(url: str):
    async def work(client: LoopbackClient) -> list[int]:
        counts = []
        for width in (1, 3, 1, 3):
            requests = [client.build_request("GET", f"{url}/echo") for _ in range(width)]
            await asyncio.gather(*map(client.send, requests))
            counts.append(len(client._idle))
        return counts

    assert with_client(work) == [1, 3, 3, 3]


def test_an_idle_connection_keeps_no_answer_in_memory(url: str):
    async def work(client: LoopbackClient) -> list[object]:
        response = await client.send(client.build_request("POST", url + "/echo"))
        assert response.content
        (connection,) = client._idle
        return [connection._answer, *connection._headers, *connection._body]

    assert with_client(work) == [None]


def test_a_connection_that_was_closed_meanwhile_is_not_used(url: str):
    async def work(client: LoopbackClient) -> int:
        await client.send(client.build_request("GET", f"{url}/echo"))
        client._idle[0].close()
        return (await client.send(client.build_request("GET", f"{url}/echo"))).status_code

    assert with_client(work) == 200


def test_the_key_is_added_by_the_sdks_own_auth(url: str):
    class Key(httpx.Auth):
        def auth_flow(self, request: httpx.Request):
            request.headers["X-API-Key"] = "tml-first"
            response = yield request
            assert response.status_code == 200
            request.headers["X-API-Key"] = "tml-second"
            yield request

    async def work(client: LoopbackClient) -> httpx.Response:
        return await client.send(client.build_request("GET", f"{url}/echo"), auth=Key())

    response = with_client(work)
    assert ["x-api-key", "tml-second"] in response.json()["headers"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((), httpx.ReadError),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n12",), httpx.ReadError),
        ((b"220 mail.example ESMTP\r\n",), httpx.RemoteProtocolError),
    ],
)
def test_half_an_answer_and_no_http_are_errors(pieces: tuple[bytes, ...], error: type[Exception]):
    with answering(*pieces) as url, pytest.raises(error) as caught:
        asked(url, "GET")
    assert caught.value.request.url == url  # type: ignore[attr-defined]


def test_an_answer_in_chunks_is_put_together():
    chunks = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"2\r\nde\r\n0\r\n\r\n",
    )
    with answering(*chunks) as url:
        assert asked(url, "GET").content == b"abcde"


def test_nobody_there_and_nobody_in_time_are_told_apart():
    with pytest.raises(httpx.ConnectError):
        asked(f"http://127.0.0.1:{free_port()}/", "GET")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(httpx.ReadTimeout):
            asked(f"http://127.0.0.1:{deaf.getsockname()[1]}/", "GET", timeout=0.2)


def test_an_answer_that_is_given_up_is_not_taken_for_the_next_one(url: str):
    async def work(client: LoopbackClient) -> tuple[int, int]:
        first = asyncio.ensure_future(client.send(client.build_request("GET", f"{url}/teapot")))
        await asyncio.sleep(0)  # it is on its way
        while not first.done() and not first.cancel():
            await asyncio.sleep(0)
        response = await client.send(client.build_request("GET", f"{url}/echo"))
        return response.status_code, len(client._idle)

    assert with_client(work) == (200, 1)


# In the SDK's hands -------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = fake_engine(tmp_path / "store", models=fake_models("course/base"))
    yield engine
    engine.stop()


@pytest.mark.parametrize("embedded", [True, False])
def test_it_is_used_where_the_engine_is_in_this_process(
    engine: Engine, embedded: bool, monkeypatch: pytest.MonkeyPatch
):
    sent: list[str] = []
    send = LoopbackClient.send

    async def counting(self: LoopbackClient, request: httpx.Request, **options: object):
        sent.append(request.url.path)
        return await send(self, request, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LoopbackClient, "send", counting)
    service = CourseService(
        choose("embedded"), engine.url, engine.api_key, ["course/base"], "course/base",
        engine if embedded else None,
    )  # fmt: skip
    client = service.create_lora_training_client(base_model="course/base").result(15)
    client.save_weights_and_get_sampling_client().result(15)
    service.close("success").result(15)
    assert bool(sent) == embedded
    if embedded:
        assert {"/api/v1/get_info", "/api/v1/retrieve_future"} <= set(sent)


def test_where_the_sdks_insides_differ_nothing_happens():
    for inside in ({}, {"_constructor_kwargs": None}, {"_constructor_kwargs": "of another kind"}):
        holder = SimpleNamespace(**inside)
        prefer_loopback(holder)  # type: ignore[arg-type]
        assert vars(holder) == inside


def test_a_client_that_the_caller_chose_stays():
    holder = SimpleNamespace(_constructor_kwargs={"http_client": "mine"})
    prefer_loopback(holder)  # type: ignore[arg-type]
    assert holder._constructor_kwargs == {"http_client": "mine"}
