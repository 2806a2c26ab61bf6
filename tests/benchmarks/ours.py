"""The engine's side: the real SDK, over loopback HTTP, against the engine in the same process."""

from __future__ import annotations

import os
import random
import tempfile
from concurrent.futures import Future
from typing import Any

from duel import Gate
from models import RANK, Row, long_questions, long_rows, model_folder, questions, reward, short_rows

LEARNING_RATE = 1e-4


def service(model: str):
    """An engine of our own on a free port, and a client of it."""
    from course_lib import connect

    store = tempfile.mkdtemp(prefix="bench-store-")
    return connect("embedded", model=model_folder(model), store=store, quiet=True)


def idle_service(model: str):
    """The same, but the engine computes nothing: what is left is the SDK, HTTP and the queues."""
    from course_lib import connect
    from course_lib.engine.models import load_models
    from course_lib.engine.server import Engine

    store = tempfile.mkdtemp(prefix="bench-store-")
    engine = Engine(load_models(model_folder(model)), store, compute=idle_compute()).launch()
    os.environ["TINKER_API_KEY"] = engine.api_key
    connected = connect(engine.url, model="course/base", quiet=True)
    connected.engine = engine  # it is in this process, so calls take the way that they take there
    return connected


def idle_compute():
    """Answers of the right shapes, at once."""
    import numpy as np

    from course_lib.engine.requests import SampledSequence, SampleResult, TrainResult
    from course_lib.engine.rooms import Compute

    def forward_backward(base: Any, adapter: Any, request: Any) -> TrainResult:
        outputs = [{"logprobs": np.zeros(len(each.tokens), np.float32)} for each in request.data]
        return TrainResult(outputs, {"loss:sum": 1.0})

    class Sampler:
        def __init__(self, base: Any) -> None:
            pass

        def submit(self, request: Any, weights: Any) -> Future[SampleResult]:
            count, future = request.max_tokens, Future()
            sequence = SampledSequence([1] * count, [-1.0] * count, "length")
            future.set_result(SampleResult([sequence] * request.num_samples))
            return future

        def step(self) -> None:
            pass

    return Compute(
        forward_backward,
        lambda adapter, params: {"grad_norm:mean": 1.0},
        lambda base, adapter: None,
        Sampler,
        lambda *args: None,
    )


def idle(gate: Gate, work: str, **options: Any) -> None:
    """`sft`, `grpo` or `sample` with an engine that computes nothing."""
    global service
    service = idle_service
    globals()[work](gate, **options)


def trainer(model: str):
    """A training client; the adapter is on attention and MLP, where TRL can have one, too."""
    connected = service(model)
    return connected.create_lora_training_client(
        base_model=connected.base_model, rank=RANK, seed=0, train_unembed=False
    ).result()


def sft_rows(shape: str, batch: int, vocabulary: int = 1024) -> list[Row]:
    """`short`, or the length of rows of random tokens."""
    if shape == "short":
        return short_rows(100 * batch)
    return long_rows(8 * batch, int(shape), vocabulary)


def datums(rows: list[Row]) -> list[Any]:
    from course_lib.batches import make_datum
    from course_lib.rendering import Rendered

    return [
        make_datum(
            Rendered(row.tokens, [0.0] * (len(row.tokens) - row.trained) + [1.0] * row.trained)
        )
        for row in rows
    ]


def train(client: Any, data: list[Any], loss_fn: str) -> None:
    import tinker

    backward = client.forward_backward(data, loss_fn)
    update = client.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
    backward.result()
    update.result()


def sft(gate: Gate, model: str, shape: str, batch: int, vocabulary: int = 1024) -> None:
    """Rows of tokens -> datums -> forward_backward and optim_step."""
    client, rng = trainer(model), random.Random(3)
    rows = sft_rows(shape, batch, vocabulary)
    while True:
        gate.lap()
        train(client, datums(rng.sample(rows, batch)), "cross_entropy")


def grpo(gate: Gate, model: str, prompts: int, group: int, tokens: int, length: int = 0) -> None:
    """Sample groups from the weights as they are, reward, advantages, one step."""
    import tinker

    from course_lib.advantages import group_advantages
    from course_lib.batches import make_rl_datum

    client, rng = trainer(model), random.Random(3)
    tokenizer = client.get_tokenizer()
    texts = long_questions(2 * prompts, length) if length else questions(512)
    params = tinker.SamplingParams(max_tokens=tokens, temperature=1.0)
    while True:
        gate.lap()
        sampler = client.save_weights_and_get_sampling_client().result()
        asked = [
            (prompt, sampler.sample(tinker.ModelInput.from_ints(prompt), group, params))
            for prompt in tokenizer(rng.sample(texts, prompts))["input_ids"]
        ]
        data = []
        for prompt, future in asked:
            sequences = future.result().sequences
            said = tokenizer.batch_decode([each.tokens for each in sequences])
            advantages = group_advantages([reward(text) for text in said])
            data += [
                make_rl_datum(prompt, each.tokens, each.logprobs, [value] * len(each.tokens))
                for each, value in zip(sequences, advantages, strict=True)
            ]
        train(client, data, "importance_sampling")


def sample(gate: Gate, model: str, calls: int, tokens: int, stops: bool = False) -> None:
    """Many `sample` calls for one completion each, all in flight at once."""
    import tinker

    connected = service(model)
    client = connected.create_sampling_client(base_model=connected.base_model).result()
    prompts = client.get_tokenizer()(questions(calls))["input_ids"]
    params = tinker.SamplingParams(max_tokens=tokens, temperature=1.0, stop=None if stops else [])
    while True:
        gate.lap()
        asked = [client.sample(tinker.ModelInput.from_ints(p), 1, params) for p in prompts]
        for future in asked:
            made = len(future.result().sequences[0].tokens)
            assert stops or made == tokens


def direct(gate: Gate, model: str, shape: str, batch: int) -> None:
    """The arithmetic of `sft` alone: the engine's functions called without SDK and HTTP."""
    import numpy as np

    from course_lib.engine.memory import keep_freed_memory
    from course_lib.engine.model import BaseModel
    from course_lib.engine.requests import AdamParams, LoraSpec, TrainDatum, TrainRequest
    from course_lib.engine.trainer import forward_backward, optim_step

    keep_freed_memory()
    base = BaseModel.load(model_folder(model), "bench")
    adapter = base.new_adapter(LoraSpec(RANK, seed=0, train_unembed=False))
    rows, rng = sft_rows(shape, batch), random.Random(3)

    def array(row: Row) -> TrainDatum:
        tokens, rest = np.array(row.tokens), len(row.tokens) - 1 - row.trained
        weights = np.array([0.0] * rest + [1.0] * row.trained, dtype=np.float32)
        return TrainDatum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})

    ready = [array(row) for row in rows]
    while True:
        gate.lap()
        chosen = rng.sample(ready, batch)
        forward_backward(base, adapter, TrainRequest(chosen, "cross_entropy"))
        optim_step(adapter, AdamParams(LEARNING_RATE))


# Rows and their tokens: longer rows, up to the context; more rows.
LENGTHS = ((8, 64), (8, 128), (8, 256), (8, 512), (8, 1023))
COUNTS = ((1, 128), (4, 128), (16, 128), (64, 128))


def growth(gate: Gate, model: str, shapes: list[tuple[int, int]]) -> None:
    """One lap: a step of each shape in turn, several times; the best of each is reported."""
    import time

    client = trainer(model)
    data = {shape: datums(long_rows(shape[0], shape[1] + 1, 1024)) for shape in shapes}
    best: dict[tuple[int, int], float] = {}
    while True:
        gate.lap(points=[[*shape, best[shape]] for shape in shapes if shape in best])
        for shape in shapes:
            for _ in range(3):
                began = time.perf_counter()
                train(client, data[shape], "cross_entropy")
                best[shape] = min(best.get(shape, 9e9), time.perf_counter() - began)


def queue(gate: Gate, model: str, requests: int) -> None:
    """Many steps asked for before the first is awaited: what does the waiting cost in memory?"""
    client, data = trainer(model), datums(long_rows(32, 257, 1024))
    train(client, data, "cross_entropy")
    gate.lap()
    for future in [client.forward_backward(data, "cross_entropy") for _ in range(requests)]:
        future.result()
    gate.lap()
