"""An engine with a stand-in for torch, and the unmodified SDK in front of it."""

from __future__ import annotations

from pathlib import Path

import httpx
import tinker
from fake_compute import FakeCompute, fake_engine, fake_models
from tinker import types

from course_lib.client.loopback import prefer_loopback
from course_lib.engine.limits import Limits

CONFIGS = {
    "defaults": {},
    "bulk": {
        "sample_use_retrieve_futures": True,
        "sample_join_sampling_session": True,
        "proto_compress_fwdbwd": True,
        "use_pyqwest_transport": False,
    },
    "serial": {"parallel_fwdbwd_chunks": False, "sample_no_retries": True},
    "defaults, loopback": {},  # by the course's own HTTP client, as `connect()` does it
}
WAIT_S = 15


class Desk:
    """An engine, the stand-in behind it, and a service client in front."""

    def __init__(
        self, store: Path, config: dict, limits: Limits | None = None, *, loopback: bool = False
    ) -> None:
        self.loopback = loopback
        self.compute = FakeCompute()
        self.engine = fake_engine(
            store,
            self.compute,
            limits,
            client_config=config | {"fwdbwd_max_chunk_len": 2},
            models=fake_models("course/base", "org/alias"),
        )
        self.service = self.connect()

    def connect(self) -> tinker.ServiceClient:
        service = tinker.ServiceClient(base_url=self.engine.url, api_key=self.engine.api_key)
        if self.loopback:
            prefer_loopback(service.holder)
        return service

    @property
    def rest(self) -> tinker.RestClient:
        return tinker.RestClient(base_url=self.engine.url, api_key=self.engine.api_key)

    def trainer(self, **options: object) -> tinker.TrainingClient:
        future = self.service.create_lora_training_client(base_model="course/base", **options)
        return future.result(WAIT_S)

    def post(self, path: str, **options: object) -> httpx.Response:
        headers = {"X-API-Key": self.engine.api_key} | options.pop("headers", {})
        return httpx.post(
            f"{self.engine.url}/api/v1/{path}", headers=headers, timeout=WAIT_S, **options
        )

    def close(self) -> None:
        self.service.close("success").result(WAIT_S)
        self.engine.stop()


def datum(first: int = 5, length: int = 3) -> types.Datum:
    tokens = [first, *range(10, 9 + length)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": tokens, "weights": [1.0] * length},
    )


PROMPT = types.ModelInput.from_ints([1, 2, 3, 4])


def sampled(client: tinker.SamplingClient, **options: object) -> types.SampleResponse:
    params = types.SamplingParams(max_tokens=options.pop("max_tokens", 2))
    return client.sample(PROMPT, options.pop("n", 1), params, **options).result(WAIT_S)
