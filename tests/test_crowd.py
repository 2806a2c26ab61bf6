"""Many learners on one engine: each trains its own adapter by SFT and GRPO, all at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types
from tiny_models import tiny_model, tiny_tokenizer

from course_lib.engine.limits import MIB, Limits
from course_lib.engine.models import load_models
from course_lib.engine.server import Engine

WAIT_S = 600
PROMPT = [50, 51, 52]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    limits = Limits(adapter_bytes=2 * MIB, active_sequences=64)
    engine = Engine(load_models(tmp_path / "model"), tmp_path / "store", limits=limits).launch()
    yield engine
    engine.stop()


def sft(client: tinker.TrainingClient, favourite: int, steps: int) -> None:
    """Teach the adapter to answer the prompt with its learner's favourite token."""
    tokens = PROMPT + [favourite] * 4
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]},
    )
    for _ in range(steps):
        computed = client.forward_backward([datum] * 2, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=2e-2)).result(WAIT_S)
        computed.result(WAIT_S)


def grpo(client: tinker.TrainingClient, favourite: int, steps: int) -> list[float]:
    """Reward the favourite token; gives the mean reward of every step."""
    rewards_seen = []
    for _ in range(steps):
        sampler = client.save_weights_and_get_sampling_client().result(WAIT_S)
        params = types.SamplingParams(max_tokens=4, stop=[])
        group = sampler.sample(types.ModelInput.from_ints(PROMPT), 8, params).result(WAIT_S)
        rewards = np.array([s.tokens.count(favourite) / 4 for s in group.sequences])
        rewards_seen.append(rewards.mean())
        data = []
        for sequence, advantage in zip(group.sequences, rewards - rewards.mean(), strict=True):
            tokens, quiet = PROMPT + sequence.tokens, [0.0] * (len(PROMPT) - 1)
            data.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={
                        "target_tokens": tokens[1:],
                        "logprobs": quiet + sequence.logprobs,
                        "advantages": quiet + [float(advantage)] * 4,
                    },
                )
            )
        client.forward_backward(data, "importance_sampling")
        client.optim_step(types.AdamParams(learning_rate=5e-3)).result(WAIT_S)
    return rewards_seen


def learn(engine: Engine, favourite: int, steps: int) -> tuple[list[int], list[float]]:
    """One learner from connection to greedy answer."""
    service = tinker.ServiceClient(base_url=engine.url, api_key=engine.api_key)
    future = service.create_lora_training_client(base_model="course/base", rank=8, seed=favourite)
    client = future.result(WAIT_S)
    sft(client, favourite, 2 * steps)
    rewards = grpo(client, favourite, steps)
    sampler = client.save_weights_and_get_sampling_client().result(WAIT_S)
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    answer = sampler.sample(types.ModelInput.from_ints(PROMPT), 1, params).result(WAIT_S)
    service.close("success").result(WAIT_S)
    return answer.sequences[0].tokens, rewards


def crowd(engine: Engine, learners: int, steps: int) -> None:
    """Every learner gets its own favourite token back, and nobody else's."""
    favourites = range(1, learners + 1)
    with ThreadPoolExecutor(learners) as pool:
        results = list(pool.map(lambda favourite: learn(engine, favourite, steps), favourites))
    assert [tokens for tokens, _ in results] == [[favourite] * 4 for favourite in favourites]
    assert engine.rooms.runs.live_bytes() <= engine.rooms.limits.adapter_bytes


def test_six_learners_at_once(engine: Engine):
    crowd(engine, learners=6, steps=6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_learners_at_once(engine: Engine, capsys: pytest.CaptureFixture[str]):
    crowd(engine, learners=30, steps=6)
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with capsys.disabled():
            print(f"\n30 learners: peak memory {peak / 1024:.0f} MiB (clients and engine together)")
