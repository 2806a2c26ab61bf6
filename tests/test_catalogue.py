"""What was made: listed, published, downloaded, copied, kept, and hidden from other learners."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import httpx
import pytest
import tinker
from click.testing import CliRunner
from engine_desk import WAIT_S, Desk, datum, sampled
from fake_compute import fake_engine
from tinker import types
from tinker.cli.__main__ import main_cli

from course_lib.engine import catalogue
from course_lib.engine.limits import Limits
from course_lib.engine.names import parse_path
from course_lib.engine.requests import RequestError
from course_lib.engine.server import Engine


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Desk]:
    """An engine of the test's own."""
    desk = Desk(tmp_path / "store", {})
    yield desk
    desk.close()


def test_runs_and_checkpoints_are_listed(plain: Desk):
    client = plain.trainer(rank=4, user_metadata={"who": "me"})
    client.save_state("one", user_metadata={"step": "1"}).result(WAIT_S)
    client.save_weights_for_sampler("two", ttl_seconds=3600).result(WAIT_S)
    run = plain.rest.get_training_run(client.model_id).result(WAIT_S)
    assert (run.base_model, run.lora_rank, run.user_metadata) == ("course/base", 4, {"who": "me"})
    assert run.last_checkpoint.checkpoint_id == "weights/one"
    assert run.last_sampler_checkpoint.expires_at is not None
    listed = plain.rest.list_checkpoints(client.model_id).result(WAIT_S).checkpoints
    assert {c.checkpoint_type for c in listed} == {"training", "sampler"}
    everything = plain.rest.list_user_checkpoints(limit=1).result(WAIT_S)
    assert (len(everything.checkpoints), everything.cursor.total_count) == (1, 2)
    runs = plain.rest.list_training_runs().result(WAIT_S)
    assert [r.training_run_id for r in runs.training_runs] == [client.model_id]
    assert plain.rest.list_training_runs(project_id="none").result(WAIT_S).training_runs == []


def test_a_run_in_training_was_used_now_and_not_when_it_was_last_saved(tmp_path: Path):
    desk = Desk(tmp_path, {}, Limits(note_s=0.2))
    client, record = desk.trainer(), next(tmp_path.glob("runs/*/run.json"))

    def last_request() -> datetime:
        return desk.rest.get_training_run(client.model_id).result(WAIT_S).last_request_time

    made = last_request()
    time.sleep(0.3)
    client.forward_backward([datum()], "cross_entropy").result(WAIT_S)
    used = last_request()
    assert (used - made).total_seconds() >= 0.3
    desk.engine.rooms.limits = Limits(note_s=60)
    written = record.stat().st_mtime_ns
    client.optim_step(types.AdamParams()).result(WAIT_S)
    assert (last_request(), record.stat().st_mtime_ns) == (used, written)  # not at every request
    desk.close()


def test_a_page_that_cannot_be_is_told_its_bounds(plain: Desk):
    """-1 and 10^12 were said not to be whole numbers."""
    for act in (
        lambda: plain.rest.list_training_runs(limit=-1),
        lambda: plain.rest.list_user_checkpoints(limit=10**12),
    ):
        with pytest.raises(tinker.BadRequestError, match=r"limit is .*from 0 to 999999999"):
            act().result(WAIT_S)


def test_a_checkpoint_is_published_given_a_time_and_deleted(plain: Desk):
    client = plain.trainer()
    path = client.save_state("one").result(WAIT_S).path
    rest = plain.rest

    def state() -> types.Checkpoint:
        return rest.list_checkpoints(client.model_id).result(WAIT_S).checkpoints[0]

    rest.publish_checkpoint_from_tinker_path(path).result(WAIT_S)
    assert state().public
    rest.unpublish_checkpoint_from_tinker_path(path).result(WAIT_S)
    assert not state().public
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result(WAIT_S)
    assert state().expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result(WAIT_S)
    assert state().expires_at is None
    info = rest.get_weights_info_by_tinker_path(path).result(WAIT_S)
    assert (info.base_model, info.lora_rank, info.train_mlp) == ("course/base", 32, True)
    rest.delete_checkpoint_from_tinker_path(path).result(WAIT_S)
    assert rest.list_checkpoints(client.model_id).result(WAIT_S).checkpoints == []
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result(WAIT_S)


def test_external_weights_are_downloaded_without_a_key(plain: Desk):
    client = plain.trainer()
    path = client.save_weights_external("out").result(WAIT_S).path
    urls = plain.rest.get_external_weights_urls(path).result(WAIT_S).urls
    assert set(urls) == {"adapter_model.safetensors", "adapter_config.json"}
    with urllib.request.urlopen(urls["adapter_config.json"], timeout=WAIT_S) as answer:
        assert json.load(answer)["peft_type"] == "LORA"
    for change in (
        ("token=", "token=0"),
        ("adapter_config", "checkpoint"),
        ("expires=1", "expires=2"),
    ):
        assert httpx.get(urls["adapter_config.json"].replace(*change)).status_code == 400


def test_age_encrypted_weights_open_with_the_identity_only(plain: Desk):
    pyrage = pytest.importorskip("pyrage")
    identity = pyrage.x25519.Identity.generate()
    client = plain.trainer()
    recipients = [str(identity.to_public())]
    saved = client.save_weights_external("secret", age_encryption_recipients=recipients)
    urls = plain.rest.get_external_weights_urls(saved.result(WAIT_S).path).result(WAIT_S).urls
    assert set(urls) == {"adapter_model.safetensors.age", "adapter_config.json.age"}
    sealed = httpx.get(urls["adapter_config.json.age"]).content
    assert sealed.startswith(b"age-encryption.org")
    assert json.loads(pyrage.decrypt(sealed, [identity]))["peft_type"] == "LORA"


def test_a_load_that_does_not_say_into_what_is_refused(plain: Desk):
    client = plain.trainer()
    body = {"path": client.save_state("one").result(WAIT_S).path, "optimizer": False}
    for ids in ({}, {"model_id": client.model_id}, {"seq_id": 2}):
        answer = plain.post("load_weights", json=body | ids)
        assert answer.status_code == 400 and "needs model_id and seq_id" in answer.text


def test_weights_are_copied_into_a_run_of_their_own(plain: Desk):
    path = plain.trainer().save_state("one").result(WAIT_S).path
    copied = plain.rest.copy_weights(path, "archive").result(WAIT_S)
    assert copied != path and copied.endswith("/weights/one")
    assert plain.service.create_training_client_from_state(copied).result(WAIT_S).model_id
    inside = plain.rest.list_training_runs(project_id="archive").result(WAIT_S).training_runs
    assert [f"tinker://{run.training_run_id}/weights/one" for run in inside] == [copied]


def test_weights_are_copied_into_a_free_slot_only(plain: Desk):
    """The copy's record replaced that of a run in training, even when the copy was refused."""
    client = plain.trainer(rank=4, user_metadata={"who": "me"})
    path = client.save_state("one").result(WAIT_S).path
    session_id, run = client.model_id.split(":")[0], client.model_id
    before = plain.engine.rooms.store.run(run)
    body = {"source_path": path, "session_id": session_id}
    refused = [plain.post("copy_weights", json=body | more) for more in ({}, {"model_seq_id": 0})]
    assert [answer.status_code for answer in refused] == [400, 400]
    assert "session_id and model_seq_id" in refused[0].text and "is taken" in refused[1].text
    assert plain.engine.rooms.store.run(run) == before
    copied = plain.post("copy_weights", json=body | {"model_seq_id": 7}).json()["tinker_path"]
    assert copied == f"tinker://{session_id}:train:7/weights/one"
    again = plain.post("copy_weights", json=body | {"model_seq_id": 7})
    assert again.status_code == 400 and "is taken" in again.text
    assert plain.rest.get_session(session_id).result(WAIT_S).training_run_ids == [
        run,
        f"{session_id}:train:7",
    ]


def test_a_copy_asked_for_twice_at_once_is_made_once(plain: Desk, monkeypatch: pytest.MonkeyPatch):
    """The second came while the first was being made, and made another."""
    path = plain.trainer().save_state("one").result(WAIT_S).path
    copy, copies = catalogue.copy_weights, []

    def slowly(*arguments: object) -> str:
        time.sleep(0.5)
        if not copies:
            copies.append("refused")
            raise RequestError("refused")
        copies.append(copy(*arguments))
        return copies[-1]

    monkeypatch.setattr(catalogue, "copy_weights", slowly)
    options = {
        "json": {"source_path": path, "destination_project_id": "archive"},
        "headers": {"X-Idempotency-Key": "k"},
    }
    assert "refused" in plain.post("copy_weights", **options).text
    with ThreadPoolExecutor() as pool:
        sent = [pool.submit(plain.post, "copy_weights", **options) for _ in range(2)]
    sent_later = plain.post("copy_weights", **options)
    answers = [answer.json()["tinker_path"] for answer in (*(s.result() for s in sent), sent_later)]
    assert copies == ["refused", answers[0]]
    assert len(set(answers)) == 1


def test_a_copy_that_fails_leaves_no_run(plain: Desk):
    client = plain.trainer()
    path = client.save_state("one").result(WAIT_S).path
    (plain.engine.rooms.store.folder(parse_path(path)) / "folder").mkdir()  # cannot be copied
    session_id = client.model_id.split(":")[0]
    body = {"source_path": path, "session_id": session_id, "model_seq_id": 7}
    assert "Could not save" in plain.post("copy_weights", json=body).text
    runs = plain.rest.list_training_runs().result(WAIT_S).training_runs
    assert [run.training_run_id for run in runs] == [client.model_id]
    body["source_path"] = client.save_state("two").result(WAIT_S).path
    assert plain.post("copy_weights", json=body).status_code == 200  # the slot is free again


def test_a_run_is_not_made_where_a_copy_lies(plain: Desk):
    """Its record replaced the copy's: another owner's rank for weights that did not fit it."""
    client = plain.trainer(rank=4)
    path, session_id = client.save_state("one").result(WAIT_S).path, client.model_id.split(":")[0]
    body = {"source_path": path, "session_id": session_id, "model_seq_id": 7}
    assert plain.post("copy_weights", json=body).status_code == 200
    run = f"{session_id}:train:7"
    before = plain.engine.rooms.store.run(run)
    more = {"session_id": session_id, "model_seq_id": 7, "base_model": "course/base"}
    answer = plain.post("create_model", json=more | {"lora_config": {"rank": 8}}).json()
    assert "is taken" in plain.post("retrieve_future", json=answer).text
    assert plain.engine.rooms.store.run(run) == before
    assert plain.engine.rooms.runs.get(run) is None


@pytest.mark.parametrize("fault", ["unreadable", "ttl"])
def test_a_copy_that_fails_leaves_no_session_open(plain: Desk, fault: str):
    path, rooms = plain.trainer().save_state("one").result(WAIT_S).path, plain.engine.rooms
    live, runs = set(rooms.sessions._live), set((rooms.store.root / "runs").iterdir())
    body: dict[str, object] = {"source_path": path, "destination_project_id": "archive"}
    if fault == "ttl":
        body["ttl_seconds"] = 1
    else:
        (rooms.store.folder(parse_path(path)) / "folder").mkdir()  # cannot be copied
    assert plain.post("copy_weights", json=body).status_code == 400
    assert set(rooms.sessions._live) == live
    assert set((rooms.store.root / "runs").iterdir()) == runs


def test_of_two_copies_into_one_slot_at_once_one_is_made(plain: Desk, monkeypatch):
    """Both found the slot free, and the run held two checkpoints, one with the other's record."""
    client = plain.trainer()
    paths = [client.save_state(name).result(WAIT_S).path for name in ("one", "two")]
    copy_files, both_asked = catalogue._copy_files, threading.Barrier(2)

    def copy_slowly(*folders: object) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_asked.wait(0.5)
        copy_files(*folders)

    monkeypatch.setattr(catalogue, "_copy_files", copy_slowly)
    slot = {"session_id": client.model_id.split(":")[0], "model_seq_id": 7}
    with ThreadPoolExecutor() as pool:
        answers = list(
            pool.map(
                lambda path: plain.post("copy_weights", json=slot | {"source_path": path}), paths
            )
        )
    assert sorted(answer.status_code for answer in answers) == [200, 400]
    assert sum("is taken" in answer.text for answer in answers) == 1
    run = client.model_id.replace(":0", ":7")
    assert len(plain.rest.list_checkpoints(run).result(WAIT_S).checkpoints) == 1


@pytest.mark.filterwarnings("ignore:RestClient.search_sessions is experimental")
def test_sessions_are_listed_and_searched(plain: Desk):
    service = tinker.ServiceClient(
        user_metadata={"lesson": "4"},
        display_name="Nightly Run",
        base_url=plain.engine.url,
        api_key=plain.engine.api_key,
    )
    client = service.create_lora_training_client(base_model="course/base").result(WAIT_S)
    session_id = service.holder.get_session_id()
    info = plain.rest.get_session(session_id).result(WAIT_S)
    assert info.training_run_ids == [client.model_id]
    assert (info.user_metadata, info.display_name) == ({"lesson": "4"}, "Nightly Run")
    service.close("errored", "why not").result(WAIT_S)
    assert session_id in plain.rest.list_sessions().result(WAIT_S).sessions
    search = plain.rest.search_sessions
    for request, found in [
        (types.SessionSearchRequest(display_name="run nightly"), True),
        (types.SessionSearchRequest(display_name="daily"), False),
        (types.SessionSearchRequest(user_metadata={"lesson": "4"}), True),
        (types.SessionSearchRequest(user_metadata={"lesson": "5"}), False),
        (types.SessionSearchRequest(session_id=session_id), True),
        (types.SessionSearchRequest(statuses=[types.FailedSessionStatusQuery()]), False),
        (types.SessionSearchRequest(statuses=[types.ClientFinishedSessionStatusQuery()]), True),
    ]:
        sessions = search(request).result(WAIT_S).sessions
        assert (session_id in [s.session_id for s in sessions]) is found, request


@pytest.mark.filterwarnings("ignore:RestClient.search_sessions is experimental")
def test_session_pages_follow_each_other(plain: Desk):
    for _ in range(4):
        plain.connect().holder.get_session_id()
    seen: list[str] = []
    request = types.SessionSearchRequest(limit=2)
    while True:
        page = plain.rest.search_sessions(request).result(WAIT_S)
        seen += [session.session_id for session in page.sessions]
        if page.next_cursor is None:
            break
        request = request.model_copy(update={"cursor": page.next_cursor})
    assert len(seen) == len(set(seen)) == len(plain.engine.rooms.store.sessions())


def test_a_sessions_trace_shows_its_requests(plain: Desk):
    client = plain.trainer()
    client.forward_backward([datum()], "cross_entropy").result(WAIT_S)
    sampled(client.save_weights_and_get_sampling_client().result(WAIT_S))
    url = plain.rest.export_session_trace(plain.service.holder.get_session_id()).result(WAIT_S)
    events = httpx.get(url).json()["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"create_model", "forward_backward", "sample"} <= names


def test_the_tinker_command_line_manages_what_was_made(
    plain: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    client = plain.trainer()
    path = client.save_state("one").result(WAIT_S).path
    session_id = plain.service.holder.get_session_id()
    monkeypatch.setenv("TINKER_BASE_URL", plain.engine.url)
    monkeypatch.setenv("TINKER_API_KEY", plain.engine.api_key)
    monkeypatch.chdir(tmp_path)

    def tinker_says(*words: str) -> str:
        done = CliRunner().invoke(main_cli, ["--format", "json", *words])
        assert done.exit_code == 0, (words, done.output)
        return done.output

    for words in (("run", "list"), ("run", "info", client.model_id), ("checkpoint", "list")):
        assert client.model_id in tinker_says(*words)
    assert "org/alias" in tinker_says("model", "list")
    tinker_says("checkpoint", "set-ttl", path, "--ttl", "7200")
    tinker_says("checkpoint", "publish", path)
    assert "true" in tinker_says("checkpoint", "info", path).lower()
    tinker_says("session", "export-trace", session_id, "--output", "it.pftrace")
    assert (tmp_path / "it.pftrace").stat().st_size > 100
    tinker_says("checkpoint", "download", path)
    assert len(list(tmp_path.glob("*_weights_one/adapter_model.safetensors"))) == 1
    tinker_says("checkpoint", "delete", path, "--yes")
    assert path not in tinker_says("checkpoint", "list")


def test_checkpoints_outlive_the_engine_and_its_key(tmp_path: Path):
    first = Desk(tmp_path, {})
    client = first.trainer()
    client.forward_backward([datum()] * 2, "cross_entropy")
    client.optim_step(types.AdamParams()).result(WAIT_S)
    path = client.save_state("kept").result(WAIT_S).path
    first.close()
    second = Desk(tmp_path, {})
    assert second.engine.api_key != first.engine.api_key
    again = second.service.create_training_client_from_state(path).result(WAIT_S)
    metrics = again.optim_step(types.AdamParams()).result(WAIT_S).metrics
    assert metrics["grad_norm:mean"] == 2.0
    assert len(second.rest.list_training_runs().result(WAIT_S).training_runs) == 2
    second.close()


def test_two_engines_share_a_store(tmp_path: Path):
    one, two = Desk(tmp_path, {}), Desk(tmp_path, {})
    path = one.trainer().save_state("shared").result(WAIT_S).path
    assert two.service.create_training_client_from_state(path).result(WAIT_S).model_id
    one.close()
    two.close()


@pytest.fixture
def engine_of_two(tmp_path: Path) -> Iterator[Engine]:
    owners = {"tml-alice-" + "a" * 20: "alice", "tml-bob-" + "b" * 20: "bob"}
    engine = fake_engine(tmp_path, owners=owners)
    yield engine
    engine.stop()


def test_one_learners_runs_are_invisible_to_the_other(engine_of_two: Engine):
    keys = ["tml-alice-" + "a" * 20, "tml-bob-" + "b" * 20]
    alice, bob = (tinker.ServiceClient(base_url=engine_of_two.url, api_key=key) for key in keys)
    rests = [tinker.RestClient(base_url=engine_of_two.url, api_key=key) for key in keys]
    client = alice.create_lora_training_client(base_model="course/base").result(WAIT_S)
    path = client.save_state("mine").result(WAIT_S).path
    assert len(rests[0].list_training_runs().result(WAIT_S).training_runs) == 1
    assert rests[1].list_training_runs().result(WAIT_S).training_runs == []
    for act in (
        lambda: rests[1].get_training_run(client.model_id),
        lambda: rests[1].delete_checkpoint_from_tinker_path(path),
        lambda: rests[1].publish_checkpoint_from_tinker_path(path),
        lambda: rests[1].get_session(alice.holder.get_session_id()),
        lambda: bob.create_training_client_from_state(path),
        lambda: bob.create_sampling_client(model_path=path),
    ):
        with pytest.raises(tinker.NotFoundError):
            act().result(WAIT_S)
    intruder = httpx.Client(headers={"X-API-Key": keys[1]}, base_url=engine_of_two.url)
    body = {"model_id": client.model_id, "seq_id": 2, "adam_params": {}}
    request_id = intruder.post("/api/v1/optim_step", json=body).json()
    answer = intruder.post("/api/v1/retrieve_future", json=request_id).json()
    assert "unknown" in answer["error"]
    token = bob.create_training_client_from_state(path, weights_access_token=keys[0])
    assert token.result(WAIT_S).model_id
    rests[0].publish_checkpoint_from_tinker_path(path).result(WAIT_S)
    assert bob.create_training_client_from_state(path).result(WAIT_S).model_id


def test_weights_are_copied_from_another_learner_with_their_token(engine_of_two: Engine):
    """The SDK sends the token of this call as a header alone; it was looked for in the body."""
    keys = ["tml-alice-" + "a" * 20, "tml-bob-" + "b" * 20]
    alice = tinker.ServiceClient(base_url=engine_of_two.url, api_key=keys[0])
    client = alice.create_lora_training_client(base_model="course/base").result(WAIT_S)
    path = client.save_state("mine").result(WAIT_S).path
    rest = tinker.RestClient(base_url=engine_of_two.url, api_key=keys[1])
    with pytest.raises(tinker.NotFoundError):
        rest.copy_weights(path, "archive").result(WAIT_S)
    with pytest.raises(tinker.NotFoundError):
        rest.copy_weights(path, "archive", weights_access_token=keys[1]).result(WAIT_S)
    copied = rest.copy_weights(path, "archive", weights_access_token=keys[0]).result(WAIT_S)
    listed = rest.list_user_checkpoints().result(WAIT_S).checkpoints
    assert [checkpoint.tinker_path for checkpoint in listed] == [copied]
