"""Bad input of every kind: never a 5xx, a hang or a dead worker, and good requests go on."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker
from fuzz_bodies import Ids, changed, damaged, good_bodies, good_chunk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tinker import types
from tiny_models import tiny_model, tiny_tokenizer

from course_lib.engine.limits import Limits
from course_lib.engine.models import load_models
from course_lib.engine.server import Engine

WAIT_S = 20
LIMITS = Limits(gap_s=0.05, hold_s=2.0, bulk_hold_s=0.2, samples_per_request=8, body_bytes=10**6)


class Target:
    """A running engine with one run, one sampler and one checkpoint to be rude to."""

    def __init__(self, folder: Path) -> None:
        tiny_model().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        models = load_models(folder / "model")
        self.engine = Engine(models, folder / "store", limits=LIMITS).launch()
        self.http = httpx.Client(
            base_url=f"{self.engine.url}/api/v1/",
            headers={"X-API-Key": self.engine.api_key},
            timeout=WAIT_S,
        )
        self.number = 0
        self.renew()

    def renew(self) -> None:
        """A session of our own: the rudeness may have ended or renamed the last one."""
        service = tinker.ServiceClient(base_url=self.engine.url, api_key=self.engine.api_key)
        client = service.create_lora_training_client(base_model="course/base", rank=2)
        self.client = client.result(WAIT_S)
        path = self.client.save_state(f"kept-{self.number}").result(WAIT_S).path
        session = service.holder.get_session_id()
        sampler = self.http.post(
            "create_sampling_session",
            json={
                "session_id": session,
                "sampling_session_seq_id": 10**6,
                "base_model": "course/base",
            },
        ).json()["sampling_session_id"]
        self.service, self.ids = service, Ids(session, self.client.model_id, sampler, path)

    def send(self, path: str, body: bytes) -> httpx.Response:
        """Send a body, and wait for the future if there is one."""
        answer = self.http.post(path, content=body)
        assert answer.status_code < 500, (path, body[:300], answer.text)
        try:
            request_id = answer.json()["request_id"]
        except (ValueError, KeyError, TypeError):
            return answer
        result = self.http.post("retrieve_future", json={"request_id": request_id})
        assert result.status_code in (200, 408), (path, body[:300], result.text)
        return answer

    def works(self) -> None:
        """A good client, from nothing to a trained step and a sample."""
        assert self.engine.rooms.worker.alive
        self.renew()
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints([1, 2]),
                loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 1.0]},
            )
        ]
        self.client.forward_backward(data, "cross_entropy")
        assert self.client.optim_step(types.AdamParams()).result(WAIT_S).metrics
        sampler = self.client.save_weights_and_get_sampling_client().result(WAIT_S)
        params = types.SamplingParams(max_tokens=2, stop=[])
        response = sampler.sample(types.ModelInput.from_ints([1]), 1, params).result(WAIT_S)
        assert len(response.sequences[0].tokens) == 2


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("fuzz"))
    yield target
    target.engine.stop()


def be_rude(target: Target, count: int, seed: int) -> None:
    """Send changed bodies to every endpoint, a good request between, and at the end."""
    rng = random.Random(seed)
    started = time.monotonic()
    for index in range(count):
        target.number += 1
        if index % 100 == 99:
            target.works()
        if rng.random() < 0.3:
            target.send("forward_backward", damaged(good_chunk(target.ids, target.number), rng))
            continue
        path, body = rng.choice(list(good_bodies(target.ids, target.number).items()))
        raw = changed(body, rng)
        target.send(path, damaged(raw, rng) if rng.random() < 0.1 else raw)
    target.works()
    assert time.monotonic() - started < 60 + count * 0.2


def test_the_unchanged_bodies_are_accepted(target: Target):
    """Or the changed ones would only ever meet the first check."""
    for path, body in good_bodies(target.ids, 1).items():
        if body.get("seq_id") == 1:
            target.number += 1
            body = body | {"seq_id": target.number + 1}
        answer = target.http.post(path, json=body)
        assert answer.status_code == 200, (path, answer.text)
    target.number += 10
    assert target.send("forward_backward", good_chunk(target.ids, 2)).status_code == 200


def test_five_hundred_changed_bodies(target: Target):
    be_rude(target, 500, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 12))
def test_ten_thousand_changed_bodies(target: Target, seed: int):
    be_rude(target, 1000, seed=seed)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
PATHS = [*good_bodies(Ids("s", "r", "m", "p"), 1), "forward_backward", "retrieve_future"]


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(path=st.sampled_from(PATHS), raw=st.binary(max_size=200), value=JSON_VALUES)
def test_any_bytes_and_any_json_are_answered(target: Target, path: str, raw: bytes, value: object):

    target.send(path, raw)
    target.send(path, json.dumps(value).encode())


def test_and_a_good_client_still_works(target: Target):
    target.works()
