"""The protocol's traps: what made a naive Tinker server hang, poll without end, or train twice."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import tinker
import torch
from engine_desk import PROMPT, WAIT_S, Desk, datum, sampled
from fake_compute import KEY, SLOW, FakeCompute, fake_models
from test_wire import datum as wire_datum
from test_wire import sent
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from course_lib.engine import sampling, tensors
from course_lib.engine.limits import Limits
from course_lib.engine.names import parse_path
from course_lib.engine.records import SessionRecord, iso, now
from course_lib.engine.requests import LoraSpec, RequestError
from course_lib.engine.runs import Run, RunTable
from course_lib.engine.samplers import GoneError, Shelf
from course_lib.engine.server import Engine
from course_lib.engine.sessions import Sessions
from course_lib.engine.storage import Store
from course_lib.engine.tensors import Scratch

SESSION = types.CreateSessionRequest(tags=[], user_metadata=None, sdk_version="0")


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Desk]:
    """An engine of the test's own, quick to give up and to answer."""
    desk = Desk(tmp_path / "store", {}, Limits(hold_s=0.3, gap_s=0.4))
    yield desk
    desk.close()


def test_a_long_operation_is_polled_twice_at_most(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A server that answers "not yet" at once is asked 650 times a second."""
    desk = Desk(tmp_path, {}, Limits(hold_s=1.0))
    polls: list[str] = []
    find = desk.engine.rooms.futures.find

    def counting(request_id: str, owner: str) -> object:
        polls.append(request_id)
        return find(request_id, owner)

    client = desk.trainer()
    desk.compute.slow_s = 1.25  # of a hold of 1 s: as 50 s are of 40
    desk.engine.rooms.futures.find = counting
    client.forward_backward([datum(SLOW)], "cross_entropy").result(WAIT_S)
    assert len(polls) == 2
    # Clients of earlier tests, whose engines are gone, may still say that their heartbeat fails.
    assert not [line for line in caplog.records if "heartbeat" not in line.getMessage()]
    desk.close()


def test_polls_that_found_nothing_leave_no_listener(plain: Desk):
    """Each of them stayed with the request: a long one gathered one more every 40 seconds."""
    client = plain.trainer()
    plain.compute.gate.clear()
    future = client.forward_backward([datum()], "cross_entropy")
    time.sleep(1.0)  # three polls of 0.3 s
    (pending,) = [p for p in plain.engine.rooms.futures._table.values() if p.reply is None]
    assert len(pending._listeners) <= 1
    plain.compute.gate.set()
    assert future.result(WAIT_S).metrics


def test_the_default_hold_suits_the_sdks_timeout():
    """The SDK gives a poll 45 s; a 50 s operation then takes two polls of 40 s."""
    assert 50 / 2 < Limits().hold_s < 45


def raw_train(run_id: str, seq_id: int, first: int = 5) -> bytes:
    message = pb.ForwardBackwardRequest.FromString(
        sent(wire_datum([first, 10], target_tokens=[5, 10], weights=[1.0, 1.0]))
    )
    message.model_id, message.seq_id = run_id, seq_id
    return message.SerializeToString()


def test_a_request_sent_again_does_not_double_the_gradient(plain: Desk):
    client = plain.trainer()
    body = raw_train(client.model_id, 1)
    ids = [plain.post("forward_backward", content=body).json()["request_id"] for _ in range(3)]
    assert len(set(ids)) == 1
    step = {"model_id": client.model_id, "seq_id": 2, "adam_params": {}}
    request_id = plain.post("optim_step", json=step).json()["request_id"]
    result = plain.post("retrieve_future", json={"request_id": request_id}).json()
    assert result["metrics"]["grad_norm:mean"] == 1.0


def test_chunks_that_arrive_as_2_3_1_are_computed_as_1_2_3(plain: Desk):
    client = plain.trainer()
    for seq_id in (2, 3, 1):
        plain.post("forward_backward", content=raw_train(client.model_id, seq_id, 20 + seq_id))
    deadline = time.monotonic() + 5
    while len(plain.compute.calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert plain.compute.calls == [f"forward_backward {20 + seq_id}" for seq_id in (1, 2, 3)]


def test_a_request_that_cannot_be_read_keeps_its_place_in_the_line(plain: Desk):
    """A 4xx leaves a hole in the numbers, and the next request waits for it."""
    client = plain.trainer()
    bad = {"model_id": client.model_id, "seq_id": 1, "adam_params": {}, "unknown": 1}
    answer = plain.post("optim_step", json=bad)
    assert answer.status_code == 200
    result = plain.post("retrieve_future", json=answer.json()).json()
    assert "unknown: Extra inputs" in result["error"]
    good = {"model_id": client.model_id, "seq_id": 2, "adam_params": {}}
    started = time.monotonic()
    answer = plain.post("optim_step", json=good).json()
    assert plain.post("retrieve_future", json=answer).json()["metrics"]
    assert time.monotonic() - started < 0.3


def test_a_burnt_number_only_delays(plain: Desk):
    client = plain.trainer()
    client._get_request_id()  # as when the SDK fails before it sends
    client._turn_counter += 1
    assert client.optim_step(types.AdamParams()).result(WAIT_S).metrics


def test_a_full_queue_answers_429_and_every_sample_arrives(tmp_path: Path):
    desk = Desk(tmp_path, {}, Limits(waiting_samples=4, active_sequences=2))
    client = desk.service.create_sampling_client(base_model="course/base").result(WAIT_S)
    sampled(client)
    desk.compute.samplers[0].step_s = 0.02
    statuses: list[int] = []
    submit = desk.engine.rooms.worker.submit_sample

    def counting(job: object) -> bool:
        accepted = submit(job)
        statuses.append(200 if accepted else 429)
        return accepted

    desk.engine.rooms.worker.submit_sample = counting
    params = types.SamplingParams(max_tokens=5)
    futures = [client.sample(PROMPT, 1, params) for _ in range(12)]
    assert all(f.result(60).sequences for f in futures)
    assert 429 in statuses
    desk.close()


def test_a_given_up_sample_is_cancelled_in_the_engine(plain: Desk):
    client = plain.service.create_sampling_client(base_model="course/base").result(WAIT_S)
    sampled(client)
    sampler = plain.compute.samplers[0]
    sampler.step_s = 0.02
    future = client.sample(PROMPT, 1, types.SamplingParams(max_tokens=120))
    time.sleep(0.3)
    future.future().cancel()
    deadline = time.monotonic() + 3
    while sampler.active and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not sampler.active
    assert len(sampler.batch_sizes) < 100


def test_an_unknown_future_is_gone_so_that_a_sample_is_sent_again(plain: Desk):
    answer = plain.post("retrieve_future", json={"request_id": "nothing"})
    assert answer.status_code == 410
    for remedy in ("Send a sample call again", "connect again"):
        assert remedy in answer.json()["error"]


def test_telemetry_is_answered(plain: Desk):
    """A 500 here costs the client 30 s with every error it raises."""
    event = {"events": [], "platform": "x", "sdk_version": "x", "session_id": "x"}
    assert plain.post("telemetry", json=event).json() == {"status": "accepted"}
    assert plain.post("telemetry", content=b"garbage").status_code == 200


def test_a_finished_session_frees_its_adapters_and_stops_heartbeats(plain: Desk):
    service = plain.connect()
    client = service.create_lora_training_client(base_model="course/base").result(WAIT_S)
    sampler = client.save_weights_and_get_sampling_client().result(WAIT_S)
    session = {"session_id": service.holder.get_session_id()}
    service.close("success").result(WAIT_S)
    assert plain.post("session_heartbeat", json=session).status_code == 410
    deadline = time.monotonic() + 3
    while plain.engine.rooms.runs.get(client.model_id) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert plain.engine.rooms.runs.get(client.model_id) is None
    adapters = plain.engine.rooms.models["course/base"].base.adapters
    assert all(adapter.deleted for adapter in adapters)
    assert plain.engine.rooms.shelf.memory_bytes() == 0
    assert sampler is not None


def test_a_snapshot_whose_session_ends_meanwhile_is_not_kept(
    plain: Desk, monkeypatch: pytest.MonkeyPatch
):
    """It joined the samplers after those of the session had been freed, and stayed."""
    client, rooms = plain.trainer(), plain.engine.rooms
    session_id, put = client.model_id.split(":")[0], rooms.shelf.put_snapshot

    def end_meanwhile(*arguments: Any) -> None:
        put(*arguments)
        rooms.end_session(session_id, {"type": "cancelled"})

    monkeypatch.setattr(rooms.shelf, "put_snapshot", end_meanwhile)
    with pytest.raises(tinker.RequestFailedError, match="has ended; connect again"):
        client.save_weights_and_get_sampling_client().result(WAIT_S)
    deadline = time.monotonic() + 3
    while rooms.shelf.memory_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not rooms.shelf.memory_bytes() and not rooms.samplers._sessions


def test_a_finished_session_leaves_no_work_and_no_results_behind(tmp_path: Path):
    """Its samples were decoded to the end, and what nobody had fetched stayed."""
    desk = Desk(tmp_path, {}, Limits(keep_delivered_s=0))
    service = desk.connect()
    training = service.create_lora_training_client(base_model="course/base").result(WAIT_S)
    client = service.create_sampling_client(base_model="course/base").result(WAIT_S)
    sampled(client)
    desk.compute.gate.clear()
    client.sample(PROMPT, 1, types.SamplingParams(max_tokens=2))
    for _ in range(3):
        training.forward_backward([datum()], "cross_entropy")
    sampler = desk.compute.samplers[0]
    sampler.step_s = 0.02
    client.sample(PROMPT, 1, types.SamplingParams(max_tokens=120))
    time.sleep(0.3)
    desk.compute.gate.set()
    service.close("success").result(WAIT_S)
    rooms = desk.engine.rooms
    deadline = time.monotonic() + 1.5
    while (len(rooms.futures) or sampler.active) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not sampler.active and not len(rooms.futures)
    assert not rooms.futures._streams and not rooms.worker._lines
    desk.close()


def test_a_run_that_could_not_be_made_leaves_nothing_behind(plain: Desk):
    for _ in range(3):
        with pytest.raises(tinker.RequestFailedError, match="rank is 0"):
            plain.trainer(rank=0)
    assert not plain.engine.rooms.worker._lines and not plain.engine.rooms.runs._runs


def test_a_silent_session_ends(plain: Desk):
    silent = plain.connect()
    silent.create_lora_training_client(base_model="course/base").result(WAIT_S)
    session_id = silent.holder.get_session_id()
    plain.engine.rooms.sessions._heard[session_id] -= 10_000
    mine = {"session_id": plain.service.holder.get_session_id()}
    assert plain.post("session_heartbeat", json=mine).status_code == 200
    assert plain.post("session_heartbeat", json={"session_id": session_id}).status_code == 410


def test_on_a_full_disk_a_silent_session_ends_all_the_same(
    plain: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Its record was written first: nothing was freed, and others' heartbeats were refused."""
    silent = plain.connect()
    run = silent.create_lora_training_client(base_model="course/base").result(WAIT_S).model_id
    mine = {"session_id": plain.service.holder.get_session_id()}
    session_id, rooms = silent.holder.get_session_id(), plain.engine.rooms

    def full(record: object) -> None:
        raise RequestError("Could not save the record: the disk is full")

    monkeypatch.setattr(rooms.store, "write_session", full)
    rooms.sessions._heard[session_id] -= 10_000
    assert plain.post("session_heartbeat", json=mine).status_code == 200
    assert plain.post("session_heartbeat", json={"session_id": session_id}).status_code == 410
    assert "disk is full" in caplog.text
    deadline = time.monotonic() + 3
    while rooms.runs.get(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rooms.runs.get(run) is None


def test_after_an_hour_asleep_the_first_to_wake_does_not_end_the_others(tmp_path: Path):
    clock = [0.0]
    sessions = Sessions(Store(tmp_path), Limits(silent_s=100), clock=lambda: clock[0])
    first, second = [sessions.create("me", SESSION).session_id for _ in range(2)]
    clock[0] = 200
    sessions.live(first, "me")
    assert sessions.silent() == []
    for clock[0] in (240, 280, 310):
        sessions.live(first, "me")
        silent = sessions.silent()
    assert silent == [second]


def test_of_what_joins_a_session_at_once_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each began from the list as it was before the other, or was written after a later one."""
    store = Store(tmp_path)
    sessions = Sessions(store, Limits())
    session_id = sessions.create("me", SESSION).session_id
    write, delays = store.write_session, iter([0.2, *[0.0] * 30])

    def at_its_own_pace(record: SessionRecord) -> None:
        time.sleep(next(delays))
        write(record)

    monkeypatch.setattr(store, "write_session", at_its_own_pace)
    names = [f"run {number}" for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda name: sessions.add_run(session_id, name), names))
    record = store.session(session_id)
    assert record is not None and sorted(record.training_run_ids) == sorted(names)


def test_what_a_sampler_costs_does_not_grow_with_their_number(tmp_path: Path):
    """Each wrote the ids of all: gigabytes in a run of 10,000 steps with a snapshot each."""
    sessions = Sessions(Store(tmp_path), Limits())
    session_id = sessions.create("me", SESSION).session_id
    record = tmp_path / "sessions" / f"{session_id}.json"
    before = record.read_bytes()
    for number in range(100):
        sessions.add_sampler(session_id, f"{session_id}:sample:{number}")
    written = sum(file.stat().st_size for file in (tmp_path / "sessions").iterdir())
    assert record.read_bytes() == before
    assert written - len(before) < 100 * 30


def test_adapters_beyond_the_memory_limit_are_parked_and_come_back(tmp_path: Path):
    desk = Desk(tmp_path, {}, Limits(adapter_bytes=2500))  # a fake adapter counts 1,000
    clients = [desk.trainer() for _ in range(6)]
    for round_number in (1, 2):
        for index, client in enumerate(clients):
            client.forward_backward([datum()] * (index + 1), "cross_entropy")
            metrics = client.optim_step(types.AdamParams()).result(WAIT_S).metrics
            assert metrics["grad_norm:mean"] == round_number * (index + 1)
            assert metrics["steps:max"] == round_number
            assert desk.engine.rooms.runs.live_bytes() <= 2500
    desk.close()


def test_a_run_is_ready_while_it_is_being_parked(tmp_path: Path):
    """Between losing its adapter and being noted as parked, get_info found no such run."""
    seen = []

    class Watched(Run):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if getattr(self, "last_used", 0):  # it has been made
                seen.append(self.ready)

    table = RunTable(Limits(adapter_bytes=1500), Scratch(tmp_path))
    model = fake_models()["course/base"]
    runs = [Watched(f"s:train:{number}", "local", "s", model) for number in range(2)]
    for run in runs:
        table.add(run)
        table.create(run, LoraSpec())
    assert runs[0].parked
    table.adapter(runs[0])
    assert runs[1].parked
    assert seen and all(seen)


def test_gradients_survive_while_others_are_parked(tmp_path: Path):
    """An adapter between forward_backward and optim_step was parked and lost its gradient; then
    it was never parked, and clients that took no step filled the memory."""
    desk = Desk(tmp_path, {}, Limits(adapter_bytes=1500))
    clients = [desk.trainer() for _ in range(3)]
    for client in clients:
        client.forward_backward([datum()], "cross_entropy").result(WAIT_S)
        assert desk.engine.rooms.runs.live_bytes() <= 1500
    for client in clients:
        client.forward_backward([datum()], "cross_entropy").result(WAIT_S)
    for client in clients:
        assert client.optim_step(types.AdamParams()).result(WAIT_S).metrics["grad_norm:mean"] == 2.0
    desk.close()


def test_snapshots_beyond_the_memory_limit_are_parked_and_come_back(tmp_path: Path):
    desk = Desk(tmp_path, {}, Limits(shelf_bytes=8))  # a fake adapter's tensor has 4 bytes
    client = desk.trainer()
    samplers = []
    for _ in range(5):
        samplers.append(client.save_weights_and_get_sampling_client().result(WAIT_S))
        client.forward_backward([datum()], "cross_entropy")
        client.optim_step(types.AdamParams()).result(WAIT_S)
        assert desk.engine.rooms.shelf.memory_bytes() <= 8
    logprobs = [sampled(sampler).sequences[0].logprobs[0] for sampler in samplers]
    assert logprobs == [-1.0, 0.0, 1.0, 2.0, 3.0]
    desk.close()


def test_a_snapshot_that_finds_no_room_on_a_full_disk_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It stayed in memory for good though its save had failed, and so did each further try."""
    shelf, model = Shelf(Limits(shelf_bytes=8), Scratch(tmp_path)), fake_models()["course/base"]

    def state(value: float) -> dict[str, torch.Tensor]:
        return {KEY: torch.tensor([value])}  # 4 bytes

    for number in range(3):  # the first is parked
        shelf.put_snapshot(f"s{number}", model, state(number))
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "write_tensors", full_disk)
        for put in (
            lambda: shelf.put_snapshot("s3", model, state(3)),
            lambda: shelf.put_snapshot("s0", model, state(4)),
            lambda: shelf.put_snapshot("s4", model, state(5)),
            lambda: shelf.weights("s0"),
        ):
            shelf.put_reader("c", model, lambda: state(9))
            with pytest.raises(RequestError, match="free disk space"):
                put()
            assert shelf.memory_bytes() == 8
    assert [shelf.weights(f"s{number}") for number in range(3)] == [0, 1, 2]
    for key in ("s3", "s4"):
        with pytest.raises(GoneError):
            shelf.weights(key)


def full_disk(file: Path, state: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_weights_that_are_replaced_while_they_are_read_are_said_to_be(
    plain: Desk, monkeypatch: pytest.MonkeyPatch
):
    """By another process, between two renames: it said that the file cannot be read."""
    path = plain.trainer().save_state("one").result(WAIT_S).path
    sampler = plain.service.create_sampling_client(model_path=path).result(WAIT_S)
    store, parsed = Store(plain.engine.rooms.store.root), parse_path(path)

    def read_in_the_gap(file: Path, what: str) -> None:
        monkeypatch.undo()
        newer = replace(store.checkpoint(parsed), created_at=iso(now()))
        store.save(parsed, newer, lambda to: copytree(file.parent, to, dirs_exist_ok=True), True)
        raise RequestError(f"{what}: {file.name} cannot be read")

    monkeypatch.setattr(sampling, "read_tensors", read_in_the_gap)
    with pytest.raises(tinker.RequestFailedError, match=r"was replaced .*make the sampler again"):
        sampled(sampler)


def test_ten_clients_at_once_see_their_own_weights_only(plain: Desk):
    def learn(count: int) -> tuple[int, float, list[float]]:
        service = plain.connect()
        client = service.create_lora_training_client(base_model="course/base").result(WAIT_S)
        for _ in range(3):
            client.forward_backward([datum()] * count, "cross_entropy")
            metrics = client.optim_step(types.AdamParams()).result(WAIT_S).metrics
        sampler = client.save_weights_and_get_sampling_client().result(WAIT_S)
        logprobs = sampled(sampler).sequences[0].logprobs
        service.close("success").result(WAIT_S)
        return count, metrics["grad_norm:mean"], logprobs

    with ThreadPoolExecutor(10) as pool:
        for count, norm, logprobs in pool.map(learn, range(1, 11)):
            assert (norm, logprobs) == (3.0 * count, [3.0 * count - 1] * 2)


def test_stopping_the_engine_fails_what_is_pending(tmp_path: Path):
    desk = Desk(tmp_path, {})
    client = desk.trainer()
    desk.compute.gate.clear()
    first = client.forward_backward([datum()], "cross_entropy")
    second = client.optim_step(types.AdamParams())
    time.sleep(0.2)
    threading.Timer(0.3, desk.compute.gate.set).start()
    desk.engine.stop()
    with pytest.raises(tinker.RequestFailedError, match="stopped"):
        second.result(WAIT_S)
    assert first.result(WAIT_S).metrics
    assert not desk.engine.running


def test_stopping_the_engine_answers_who_polls_for_nothing_in_particular(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A bulk poll without requests got status 500 after a second, and a traceback was shown."""
    desk = Desk(tmp_path, {})
    desk.service.create_sampling_client(base_model="course/base").result(WAIT_S)
    (sampler,) = desk.engine.rooms.samplers._sessions
    target = {"sampling_session_id": sampler, "cloned_sampler_id": 0}
    body = {"target": target, "prev_cursor": 0, "retrieved_request_ids": []}
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(desk.post, "retrieve_futures", json=body)
        time.sleep(0.3)
        desk.engine.stop()
        answer = poll.result(WAIT_S)
    assert (answer.status_code, answer.json()["completions"]) == (200, [])
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_ctrl_c_answers_those_who_wait_before_it_closes_their_connections(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """They asked an engine that was gone for ever, and its terminal showed a traceback."""
    compute = FakeCompute(slow_s=1.0, step_s=0.02)
    engine = Engine(fake_models(), tmp_path, compute=compute.rooms())
    serving = threading.Thread(target=engine.serve)
    serving.start()
    service = tinker.ServiceClient(base_url=engine.url, api_key=engine.api_key)
    client = service.create_lora_training_client(base_model="course/base").result(WAIT_S)
    sampler = service.create_sampling_client(base_model="course/base").result(WAIT_S)
    sample = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=120))
    computed = client.forward_backward([datum(SLOW)], "cross_entropy")
    waiting = client.optim_step(types.AdamParams())
    time.sleep(0.5)
    engine._server.handle_exit(signal.SIGINT, None)
    assert computed.result(WAIT_S).metrics
    for future in (waiting, sample):
        with pytest.raises(tinker.RequestFailedError, match="The engine was stopped"):
            future.result(WAIT_S)
    serving.join(WAIT_S)
    assert not engine.rooms.worker.alive and not engine.rooms.scratch.folder.exists()
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]
