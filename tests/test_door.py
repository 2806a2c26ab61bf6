"""Who may enter: keys, hosts, browser pages, sizes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_compute import FakeCompute, fake_engine, fake_models

from course_lib.engine import serve_forever, server, start
from course_lib.engine.access import Access, new_key, read_keys
from course_lib.engine.limits import Limits
from course_lib.engine.server import Engine
from course_lib.errors import CourseError


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = fake_engine(tmp_path_factory.mktemp("store"), limits=Limits(body_bytes=10_000))
    yield engine
    engine.stop()


def ask(engine: Engine, key: str | bytes | None = None, **headers: str) -> int:
    given = {"X-API-Key": engine.api_key if key is None else key} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return httpx.get(f"{engine.url}/api/v1/training_runs", headers=given).status_code


def test_the_engine_listens_on_loopback_only(engine: Engine):
    assert engine.socket.getsockname()[0] == "127.0.0.1"


def test_who_calls_before_the_engine_answers_is_answered_later(tmp_path: Path):
    """`posttrain engine` prints its URL before the app runs: a quick client was refused."""
    engine = Engine(fake_models(), tmp_path, compute=FakeCompute().rooms())
    with socket.create_connection(engine.socket.getsockname(), timeout=5) as early:
        engine.launch()
        early.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert early.recv(100).startswith(b"HTTP/1.1 200")
    engine.stop()


def test_small_answers_are_not_held_back(engine: Engine):
    """A socket made without IPPROTO_TCP gets no TCP_NODELAY from asyncio: 40 ms more per call."""
    assert engine.socket.proto == socket.IPPROTO_TCP


def test_only_the_key_of_this_start_opens(engine: Engine):
    assert ask(engine) == 200
    almost = [engine.api_key[:-1], engine.api_key + "x", engine.api_key.upper()]
    for key in ("", "tml-wrong", new_key(), "tml-é".encode(), *almost):
        assert ask(engine, key) == 401


def test_every_key_is_new_and_of_the_sdks_form():
    keys = {new_key() for _ in range(20)}
    assert len(keys) == 20 and all(key.startswith("tml-") and len(key) > 40 for key in keys)


def test_every_known_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("course_lib.engine.access.hmac.compare_digest", compare)
    access = Access({"tml-a": "alice", "tml-b": "bob", "tml-c": "carol"})
    assert access.owner_of("tml-a") == "alice"
    assert compared == [b"tml-a", b"tml-b", b"tml-c"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "["]
)
def test_a_rebound_dns_name_is_refused(engine: Engine, host: str):
    assert ask(engine, Host=host) == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "[::1]:80", "LOCALHOST"])
def test_names_of_this_machine_are_let_in(engine: Engine, host: str):
    assert ask(engine, Host=host) == 200


def test_browser_pages_are_refused(engine: Engine):
    assert ask(engine, Origin="https://evil.example") == 403
    assert ask(engine, Origin="null") == 403
    assert ask(engine, Origin=engine.url) == 403
    assert ask(engine, Sec_Fetch_Site="cross-site") == 403
    assert ask(engine, Sec_Fetch_Site="none") == 200  # typed into the address bar


def test_large_bodies_are_refused_announced_or_not(engine: Engine):
    url, headers = f"{engine.url}/api/v1/telemetry", {"X-API-Key": engine.api_key}
    assert httpx.post(url, content=bytes(10_001), headers=headers).status_code == 413
    in_parts = (bytes(1000) for _ in range(50))
    assert httpx.post(url, content=in_parts, headers=headers).status_code == 400
    assert httpx.post(url, content=bytes(10_000), headers=headers).status_code == 200


def test_only_health_is_open_to_all(engine: Engine):
    assert httpx.get(f"{engine.url}/api/v1/healthz").json() == {"status": "ok"}
    for path in ("get_server_capabilities", "checkpoints", "download/x", "nothing"):
        assert httpx.get(f"{engine.url}/api/v1/{path}").status_code in (401, 404)
    assert httpx.get(f"{engine.url}/api/v1/checkpoints").status_code == 401


@pytest.mark.parametrize(
    "place", ["training_runs/..%2F..%2Fetc", "training_runs/a%00b", "sessions/.."]
)
def test_urls_cannot_leave_the_store(engine: Engine, place: str):
    answer = httpx.get(f"{engine.url}/api/v1/{place}", headers={"X-API-Key": engine.api_key})
    assert answer.status_code in (400, 404)


def test_a_keys_file_names_a_learner_a_line(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(f"# our class\n\nalice tml-{'a' * 20}\nbob-2   tml-{'b' * 20}\n")
    assert read_keys(file) == {f"tml-{'a' * 20}": "alice", f"tml-{'b' * 20}": "bob-2"}


def test_a_keys_file_may_begin_with_the_byte_order_mark_of_notepad(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(f"alice tml-{'a' * 20}\n", encoding="utf-8-sig")
    assert read_keys(file) == {f"tml-{'a' * 20}": "alice"}


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("", "names no learner"),
        ("alice\n", ":1: not a name and a key"),
        ("# x\nalice secret\n", ":2: the key of alice"),
        ("al/ice tml-" + "a" * 20, ":1: not a name"),
        (f"a tml-{'a' * 20}\nb tml-{'a' * 20}", ":2: b has the same key as a"),
    ],
)
def test_a_wrong_keys_file_is_told_by_its_line(tmp_path: Path, text: str, finding: str):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(CourseError, match=finding) as error:
        read_keys(file)
    assert "aaaa" not in str(error.value)  # keys are never shown


def test_one_engine_a_process_however_its_models_folder_is_written(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The same folder by a relative path was told to be another model, and aliases not at all."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    alias = ("org/name", str(tmp_path / "model"))
    key = (str(tmp_path / "model"), tmp_path / "store", (alias,))
    monkeypatch.setitem(server._running, key, engine)
    assert start("model", "store", aliases={"org/name": "./model"}) is engine
    with pytest.raises(CourseError, match=r"and the aliases org/name=.*model; stop it"):
        start("model", "store")


def test_an_address_that_others_reach_needs_a_keys_file():
    with pytest.raises(CourseError, match=r"--host 0\.0\.0\.0"):
        serve_forever(host="0.0.0.0")


def test_a_store_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CourseError, match="cannot be a store"):
        fake_engine(tmp_path / "file" / "store")


def test_a_taken_port_is_said_in_a_sentence(engine: Engine, tmp_path: Path):
    port = engine.socket.getsockname()[1]
    with pytest.raises(CourseError, match=f"--port {port}"):
        fake_engine(tmp_path, port=port)


@pytest.mark.parametrize("host", ["192.0.2.1", "nobody.invalid"])
def test_an_address_that_this_machine_lacks_is_not_called_a_taken_port(host: str, tmp_path: Path):
    with pytest.raises(CourseError, match=f"--host {host}: cannot be used"):
        fake_engine(tmp_path, host=host)


def test_a_name_in_braces_is_a_name_like_any_other(engine: Engine):
    """Routes without parameters are looked up by their path; those with some must not be."""
    url, headers = f"{engine.url}/api/v1/training_runs/%7Brun%7D", {"X-API-Key": engine.api_key}
    answer = httpx.get(url, headers=headers)
    other = httpx.get(url.replace("run%7D", "name%7D"), headers=headers)
    assert answer.status_code == other.status_code
    assert answer.text.replace("{run}", "{name}") == other.text
