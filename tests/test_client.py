"""connect(): where the calls go, why, and what is said when they cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import tinker
from fake_compute import fake_engine, fake_models
from loopback import free_port
from tiny_models import tiny_model, tiny_tokenizer

from course_lib import client
from course_lib.cli import main
from course_lib.client import choose, connect, resolve_model
from course_lib.client import service as service_module
from course_lib.client.watch import Pace, leave, leave_all, watch
from course_lib.config import preset
from course_lib.dotenv import SETTINGS, misread_lines, read_env_file
from course_lib.engine.server import Engine, start
from course_lib.errors import CourseError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def nobodys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home with a stored hosted login, which must never decide anything."""
    stored = tmp_path / "home" / ".tinker" / "credentials.json"
    stored.parent.mkdir(parents=True)
    stored.write_text('{"keys": [{"key": "tml-stored", "default": true}]}')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Engine]:
    engine = fake_engine(tmp_path / "theirs", models=fake_models("org/a", "org/b"))
    yield engine
    engine.stop()


# The choice --------------------------------------------------------------------------------------


def test_without_any_setting_the_engine_is_embedded_even_with_a_stored_login():
    assert choose().backend == "embedded"


def test_the_order_is_argument_then_course_backend_then_url_then_key(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    assert choose().backend == "hosted"
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:1/")
    assert (choose().backend, choose().url) == ("url", "http://127.0.0.1:1")
    monkeypatch.setenv("COURSE_BACKEND", "embedded")
    assert choose().backend == "embedded"
    assert choose("hosted").backend == "hosted"
    assert choose("https://cluster:1").url == "https://cluster:1"


def test_each_choice_says_its_reason(monkeypatch: pytest.MonkeyPatch):
    assert choose("hosted").reason == "backend='hosted'"
    monkeypatch.setenv("COURSE_BACKEND", "hosted")
    assert choose().reason == "COURSE_BACKEND is set"


@pytest.mark.parametrize(
    "backend",
    ["embeded", "ftp://x", "http://a b", "http://", "http://a:port", "http://[a", "http://a:0"],
)
def test_an_unknown_back_end_is_refused(backend: str):
    with pytest.raises(CourseError, match="is not a back end"):
        choose(backend)


def test_the_env_file_is_read_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("COURSE_ENV_FILE")
    (tmp_path / ".env").write_text(
        "# my keys\n\nexport TINKER_API_KEY='tml-from-file'\nTINKER_BASE_URL=\nnonsense\n"
    )
    assert choose().backend == "hosted"
    assert client.setting("TINKER_API_KEY") == "tml-from-file"
    assert "TINKER_API_KEY" not in os.environ  # a key is not handed on to every subprocess
    monkeypatch.setenv("TINKER_API_KEY", "tml-from-environment")
    assert client.setting("TINKER_API_KEY") == "tml-from-environment"


def test_lines_of_the_env_file_that_set_nothing_are_named_without_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("COURSE_ENV_FILE")
    (tmp_path / ".env").write_text(
        "# a comment\n\nTINKER_API_KEY: tml-secret\nTINKER_BASEURL=http://a:1\nset COURSE_STORE=b\n"
        "export COURSE_PRESET='tiny'\nHF_HOME=/data\ntinker_api_key=tml-secret\nCOURSE_BACKEND\n"
    )
    assert misread_lines() == [
        ".env:3: sets nothing; write TINKER_API_KEY=value",
        ".env:4: TINKER_BASEURL is no setting; perhaps TINKER_BASE_URL is meant",
        ".env:5: sets nothing; write COURSE_STORE=value",
        ".env:8: tinker_api_key is no setting; perhaps TINKER_API_KEY is meant",
        ".env:9: sets nothing; write COURSE_BACKEND=value",
    ]
    assert set(read_env_file()) >= {"COURSE_PRESET", "HF_HOME"}
    (tmp_path / ".env").write_text("tml-secret\n")  # the key alone
    assert misread_lines() == [".env:1: sets nothing; write NAME=value"]
    (tmp_path / ".env").write_text((ROOT / ".env.example").read_text())
    assert tuple(read_env_file()) == SETTINGS and misread_lines() == []


def test_a_notebook_reads_the_projects_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its kernel stands in notebooks/; a file of that folder's own would win."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / ".env").write_text("COURSE_PRESET=full\n")
    monkeypatch.setattr("course_lib.dotenv.PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path / "notebooks")
    assert preset().preset == "tiny"  # COURSE_ENV_FILE is empty in tests: no file at all
    monkeypatch.delenv("COURSE_ENV_FILE")
    assert preset().preset == "full"
    Path(".env").write_text("COURSE_PRESET=quick\n")
    assert preset().preset == "quick"


def test_preset_and_store_may_stand_in_the_env_file(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """.env.example offers both, and only the back end was read from it."""
    monkeypatch.delenv("COURSE_ENV_FILE")
    monkeypatch.delenv("COURSE_STORE")
    (tmp_path / ".env").write_text("COURSE_PRESET=quick\nCOURSE_STORE=elsewhere\n")
    assert preset().preset == "quick"
    engine = start(model=tiny_folder)
    engine.stop()
    assert (tmp_path / "elsewhere").is_dir() and not (tmp_path / "runs").exists()


# Hosted ------------------------------------------------------------------------------------------


def test_hosted_without_a_key_is_refused():
    with pytest.raises(CourseError, match="TINKER_API_KEY: it is not set"):
        connect("hosted", confirm=True)


def test_hosted_asks_first_and_does_not_show_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-very-secret")
    with pytest.raises(CourseError, match="cost money") as error:
        connect()
    assert "very-secret" not in str(error.value)


def test_a_confirmed_hosted_run_goes_to_the_hosted_address(
    server: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TINKER_API_KEY", server.api_key)
    monkeypatch.setattr(service_module, "hosted_url", lambda: server.url)
    service = connect(confirm=True)
    assert service.backend == "hosted"
    said = capsys.readouterr().out
    assert said == "Calls go to hosted Tinker, which costs money (TINKER_API_KEY is set).\n"
    assert server.api_key not in said


def test_a_wrong_hosted_key_is_said(server: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service_module, "hosted_url", lambda: server.url)
    monkeypatch.setenv("TINKER_API_KEY", "tml-wrong")
    with pytest.raises(CourseError, match="refuses the key"):
        connect(confirm=True)
    monkeypatch.setenv("TINKER_API_KEY", "sk-of-somebody-else")
    with pytest.raises(CourseError, match="does not begin with tml-"):
        connect(confirm=True)
    for copied in ("tml-a b", "tml-a\n", "tml-\N{EN DASH}"):
        monkeypatch.setenv("TINKER_API_KEY", copied)
        with pytest.raises(CourseError, match="copy the key again"):
            connect(confirm=True)


def test_hosted_tinker_out_of_reach_is_a_matter_of_the_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    monkeypatch.setattr(service_module, "hosted_url", lambda: f"http://127.0.0.1:{free_port()}")
    with pytest.raises(CourseError, match="look at your network"):
        connect(confirm=True)


# A server by URL ---------------------------------------------------------------------------------


def test_an_unreachable_url_is_said_within_ten_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    started = time.monotonic()
    with pytest.raises(CourseError, match="no Tinker server can be reached"):
        connect(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 10


def test_a_server_that_never_answers_is_said_within_ten_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    monkeypatch.setattr("course_lib.client.probe.TIMEOUT_S", 1.0)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        started = time.monotonic()
        with pytest.raises(CourseError, match="no Tinker server can be reached"):
            connect(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        assert time.monotonic() - started < 3
    assert service_module.probe.__module__ == "course_lib.client.probe"


@contextmanager
def answering(status: int, kind: str, body: str) -> Iterator[str]:
    """The URL of a server that answers everything so."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def log_message(self, *args: object) -> None: ...

    other = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{other.server_port}"
    other.shutdown()


def check_that_it_is_no_tinker(monkeypatch: pytest.MonkeyPatch, kind: str, body: str) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    with (
        answering(200, kind, body) as url,
        pytest.raises(CourseError, match="not as a Tinker server"),
    ):
        connect(url)


def set_proxy(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HTTP_PROXY", value)


def test_a_proxy_that_swallows_the_calls_is_named_but_not_its_password(
    monkeypatch: pytest.MonkeyPatch,
):
    """A school's proxy stood before the teacher's engine, and we said to start the engine."""
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    set_proxy(monkeypatch, f"http://ada:secret@127.0.0.1:{free_port()}")

    with pytest.raises(CourseError, match=r"HTTP_PROXY.*set NO_PROXY=192") as told:
        connect("http://192.0.2.1:8100")
    assert "secret" not in str(told.value)


def test_a_proxy_that_answers_itself_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    for status in (403, 407, 502):
        with answering(status, "text/html", "<html>") as url:
            set_proxy(monkeypatch, url)
            with pytest.raises(CourseError, match=f"status {status}.*perhaps the proxy of HTTP"):
                connect("http://192.0.2.1:8100")


def test_somebody_elses_server_is_said(monkeypatch: pytest.MonkeyPatch):
    check_that_it_is_no_tinker(monkeypatch, "text/html", "")


def test_a_server_by_url_is_used_with_its_models(
    server: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", server.api_key)
    service = connect()
    assert capsys.readouterr().out == f"Calls go to {server.url} (TINKER_BASE_URL is set).\n"
    assert (service.backend, service.models) == ("url", ["org/a", "org/b"])
    with pytest.raises(CourseError, match="2 models and none was chosen"):
        resolve_model(service)
    assert resolve_model(service, "org/b") == "org/b"
    with pytest.raises(CourseError, match=r"model org/bb: .*does not have it; use org/b"):
        resolve_model(service, "org/bb")
    chosen = connect(model="org/b", quiet=True)
    assert capsys.readouterr().out == ""
    trained = chosen.create_lora_training_client(base_model=chosen.base_model).result(10)
    assert trained.get_info().model_name == "org/b"
    assert chosen.rest.list_training_runs().result(10).training_runs[0].base_model == "org/b"


def test_a_proxy_in_the_environment_does_not_swallow_loopback(
    server: Engine, monkeypatch: pytest.MonkeyPatch
):
    """With HTTP_PROXY set the SDK's first call hung without a word."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "example.com")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("TINKER_API_KEY", server.api_key)
    service = connect(server.url, model="org/a", quiet=True)
    assert service.create_lora_training_client(base_model="org/a").result(10).model_id
    assert os.environ["NO_PROXY"] == "example.com,127.0.0.1,localhost,::1"


def test_another_sdk_version_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What counts is the one that is loaded. `pip install` in a running kernel, as the message
    says, made `connect` content with the old one, whose next call could not be understood.
    """
    for installed, fits in (("0.37.9", False), ("0.38.0", True), ("0.38.5", True), ("0.39", False)):
        monkeypatch.setattr(tinker, "__version__", installed)
        if fits:
            service_module.check_sdk_version()
        else:
            with pytest.raises(CourseError, match=f"tinker {installed}"):
                connect()
            assert main(["engine", "--port", "70000"]) == 1  # it started, or ended in a traceback
            assert f"tinker {installed}" in capsys.readouterr().err


# A server that falls silent ----------------------------------------------------------------------


def test_a_server_that_falls_silent_and_comes_back_is_said_once_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The SDK waits for a result that is due without a word, for ever."""
    pace = Pace(every_s=0.02, again_s=0.02, patience_s=0.1)
    engine = fake_engine(tmp_path / "first")
    client, second, port = Caller(), Caller(), int(engine.url.rpartition(":")[2])
    watch(engine.url, client, pace)
    watch(engine.url, second, pace)
    assert watchers(engine.url) == 1
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # it answers
    engine.stop()
    said = said_within(capsys, 5)
    assert said.startswith(f"{engine.url}: no answer for ") and said.count("\n") == 1
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # once
    again = fake_engine(tmp_path / "second", port=port)
    assert said_within(capsys, 5).startswith(f"{engine.url}: answers again, after ")
    leave(engine.url, client)
    del second
    again.stop()
    time.sleep(0.5)
    assert capsys.readouterr().err == ""  # nobody calls there any more
    assert watchers(engine.url) == 0


def test_a_server_that_nobody_calls_any_more_may_end_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    engine, client = fake_engine(tmp_path), Caller()
    watch(engine.url, client, Pace(every_s=0.02, again_s=0.02, patience_s=0.1))
    leave_all()
    engine.stop()
    time.sleep(0.5)
    assert capsys.readouterr().err == ""
    assert watchers(engine.url) == 0


class Caller:
    """Stands for a service client."""


def watchers(url: str) -> int:
    return sum(thread.name == f"course-watch {url}" for thread in threading.enumerate())


def said_within(capsys: pytest.CaptureFixture[str], seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if said := capsys.readouterr().err:
            return said
        time.sleep(0.02)
    raise AssertionError("nothing was said")


# The embedded engine -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(find_spec("socksio") is not None, reason="httpx can use a SOCKS proxy")
def test_a_socks_proxy_that_nobody_here_can_use_is_told_or_passed_by(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The embedded engine, which needs no network, ended in httpx's traceback."""
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    set_proxy(monkeypatch, "socks5h://127.0.0.1:9")

    with pytest.raises(CourseError, match=r"unset HTTP_PROXY, or: pip install 'httpx\[socks\]'"):
        connect("http://192.0.2.1:8100")
    service = connect("embedded", model=str(tiny_folder))
    assert service.create_sampling_client(base_model=service.base_model).result()
    assert service.engine is not None
    service.engine.stop()


def test_a_model_that_is_not_there_is_said_while_an_engine_is_running(
    tiny_folder: Path, tmp_path: Path
):
    """The answer was that an engine is running, and after a restart that the folder is missing."""
    service = connect("embedded", model=str(tiny_folder))
    for name in ("./nope", str(tmp_path / "nope")):
        with pytest.raises(CourseError, match="nope: there is no such folder; give a folder"):
            connect("embedded", model=name)
    with pytest.raises(CourseError, match="the folder holds no config"):
        connect("embedded", model=str(tmp_path))
    with pytest.raises(CourseError, match=r"one is running already.* service\.engine\.stop\(\)"):
        connect("embedded")
    assert service.engine is not None
    service.engine.stop()


SESSION = """
    import sys, time
    from course_lib import connect
    service = connect(model=sys.argv[1], store="store")
    again = connect(model=sys.argv[1], store="store", quiet=True)
    assert again.engine is service.engine and again is not service
    from tinker import types
    client = service.create_lora_training_client(base_model=service.base_model, rank=4).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    other = service.create_sampling_client(base_model=service.base_model).result()
    tokens = sampler.get_tokenizer().encode("hello")
    for maker in (client, other):
        assert maker.get_tokenizer().encode("hello") == tokens
    data = [types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]),
                        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 4})]
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(types.AdamParams()).result()
    params = types.SamplingParams(max_tokens=3)
    sampler.sample(types.ModelInput.from_ints(tokens), 2, params).result()
    try:
        client.forward_backward(data, "nonsense").result()
    except Exception as error:
        print(type(error).__name__)
    print("done", time.time())
"""


def test_a_whole_session_says_one_line_and_nothing_on_stderr_and_ends_at_once(
    tiny_folder: Path, tmp_path: Path
):
    """A strict notebook rejects any output on stderr: warnings, progress bars, telemetry."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HTTP_PROXY": "http://127.0.0.1:9"}
    environment.pop("TINKER_TELEMETRY")
    del environment["COURSE_STORE"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SESSION), str(tiny_folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    ended = time.time()
    assert done.stderr == ""
    first, error, last = done.stdout.splitlines()
    assert first == (
        "Calls go to the embedded engine in this process, store "
        f"{tmp_path / 'store'} (no TINKER_BASE_URL, no TINKER_API_KEY)."
    )
    assert error == "RequestFailedError"
    assert ended - float(last.split()[1]) < 6
    assert not any((tmp_path / "store" / "scratch").iterdir())
    assert not (tmp_path / "home" / ".cache" / "huggingface").exists()  # nobody's home was touched


def test_a_missing_model_folder_is_said(tmp_path: Path):
    with pytest.raises(CourseError, match="nowhere"):
        connect("embedded", model=str(tmp_path / "nowhere"), store=tmp_path / "s")


def test_names_that_were_not_taught_still_go_to_the_hub(monkeypatch: pytest.MonkeyPatch):
    from tinker.lib.public_interfaces import sampling_client, training_client

    from course_lib.client import tokenizers

    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr(tokenizers, "_folders", {})
    for module in (sampling_client, training_client):
        monkeypatch.setattr(
            module,
            "_load_tokenizer_from_model_info",
            lambda name, folder=None: asked.append((name, folder)),
        )
    tokenizers.teach({"course/base": str(ROOT), "not/here": "/nonexistent"})
    for name in ("course/base", "not/here", "meta-llama/Llama-3.2-1B"):
        sampling_client._load_tokenizer_from_model_info(name)
    assert asked == [
        ("course/base", str(ROOT)),
        ("not/here", None),
        ("meta-llama/Llama-3.2-1B", None),
    ]


# What a person or a stranger wrote ----------------------------------------------------------------


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `.env` of the working folder, which is read in this test."""
    monkeypatch.delenv("COURSE_ENV_FILE")
    return tmp_path / ".env"


def test_env_file_with_a_byte_order_mark_is_read(env: Path):
    """Windows editors write it; the first name then began with an invisible letter."""
    env.write_text("TINKER_API_KEY=tml-x\n", encoding="utf-8-sig")
    assert choose().backend == "hosted"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("COURSE_BACKEND=hosted\n".encode("utf-16"), 1),
        ("COURSE_BACKEND=hosted\n".encode("utf-16-le"), 1),  # valid UTF-8, full of NUL
        ("COURSE_BACKEND=hosted\n# für mich\n".encode("latin-1"), 2),
    ],
)
def test_env_file_in_another_encoding_is_refused(env: Path, content: bytes, line: int):
    """It was ignored as a whole: the run went elsewhere than the learner had written."""
    env.write_bytes(content)
    with pytest.raises(CourseError) as caught:
        connect()
    assert str(caught.value) == f".env:{line}: it is not UTF-8 text; save the file as UTF-8"


def test_env_values_end_where_a_comment_begins(env: Path):
    env.write_text(
        "COURSE_BACKEND=embedded # local\n"
        "TINKER_API_KEY='tml-a #1'\t# quoted\n"
        'COURSE_STORE="here"#there\n'
        "COURSE_PRESET=a#b\n"
        "TINKER_BASE_URL= # none\n"
    )
    assert choose().backend == "embedded"
    assert read_env_file() == {
        "COURSE_BACKEND": "embedded",
        "TINKER_API_KEY": "tml-a #1",
        "COURSE_STORE": "here",
        "COURSE_PRESET": "a#b",
        "TINKER_BASE_URL": "",
    }


@pytest.mark.parametrize(
    "body", ['{"ok": true}', "[]", "no JSON", '{"supported_models": ["a"]}', "null"]
)
def test_probe_of_a_json_server_that_is_not_tinker_is_said(
    body: str, monkeypatch: pytest.MonkeyPatch
):
    """It answered, and we said "no Tinker server can be reached there ('supported_models')"."""
    check_that_it_is_no_tinker(monkeypatch, "application/json", body)
