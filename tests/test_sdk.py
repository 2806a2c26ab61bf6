"""The whole way with a real (tiny) model: what the SDK's user sees agrees with torch and peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

from course_lib.engine.models import load_models, tokenizer_home
from course_lib.engine.names import parse_path
from course_lib.engine.server import Engine

WAIT_S = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def launched(folder: Path, store: Path) -> Engine:
    return Engine(load_models(folder), store).launch()


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = launched(folder, tmp_path_factory.mktemp("store"))
    yield engine
    engine.stop()


def connected(engine: Engine) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=engine.url, api_key=engine.api_key)


@pytest.fixture(scope="module")
def service(engine: Engine) -> tinker.ServiceClient:
    return connected(engine)


def trainer(service: tinker.ServiceClient, **options: object) -> tinker.TrainingClient:
    options = {"rank": 4, "seed": 0} | options
    return service.create_lora_training_client(base_model="course/base", **options).result(WAIT_S)


def datum(seed: int, length: int = 12) -> types.Datum:
    tokens = random_tokens(length + 1, seed).tolist()
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * length},
    )


DATA = [datum(seed, 8 + seed) for seed in range(4)]


def steps(client: tinker.TrainingClient, count: int, rate: float = 1e-3) -> list[float]:
    """Train, and give the loss of every step."""
    losses = []
    for _ in range(count):
        computed = client.forward_backward(DATA, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=rate)).result(WAIT_S)
        losses.append(computed.result(WAIT_S).metrics["loss:sum"])
    return losses


def test_of_a_large_batch_with_one_wrong_datum_nothing_stays(service: tinker.ServiceClient):
    client, data = trainer(service), [datum(0, 2)] * 1030
    data[1028] = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": [2, 99_999], "weights": [1.0, 1.0]},
    )
    with pytest.raises(tinker.RequestFailedError, match=r"data\[1028\]"):
        client.forward_backward(data, "cross_entropy").result(WAIT_S)
    update = client.optim_step(types.AdamParams(learning_rate=0.0)).result(WAIT_S)
    assert update.metrics["grad_norm:mean"] == 0


def test_the_loss_falls(service: tinker.ServiceClient):
    losses = steps(trainer(service), 8)
    assert losses[-1] < losses[0]


def test_the_loss_is_minus_the_sum_of_the_logprobs(service: tinker.ServiceClient):
    result = trainer(service).forward(DATA, "cross_entropy").result(WAIT_S)
    total = sum(output["logprobs"].to_numpy().sum() for output in result.loss_fn_outputs)
    assert result.metrics["loss:sum"] == pytest.approx(-total, rel=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_sampled_logprobs_are_the_trainers(service: tinker.ServiceClient, trained: bool):
    """The importance ratio at step 0 is 1: sampler and trainer are the same distribution."""
    client = trainer(service)
    if trained:
        steps(client, 3, rate=1e-2)
    sampler = client.save_weights_and_get_sampling_client().result(WAIT_S)
    prompt = random_tokens(7, 3).tolist()
    params = types.SamplingParams(max_tokens=20, seed=1, stop=[])
    response = sampler.sample(types.ModelInput.from_ints(prompt), 4, params).result(WAIT_S)
    assert len({tuple(sequence.tokens) for sequence in response.sequences}) > 1
    for sequence in response.sequences:
        tokens = prompt + sequence.tokens
        scored = client.forward(
            [
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={
                        "target_tokens": tokens[1:],
                        "weights": [1.0] * (len(tokens) - 1),
                    },
                )
            ],
            "cross_entropy",
        ).result(WAIT_S)
        logprobs = scored.loss_fn_outputs[0]["logprobs"].to_numpy()[len(prompt) - 1 :]
        assert np.abs(logprobs - np.array(sequence.logprobs)).max() < 1e-4


def test_a_saved_adapter_is_one_that_peft_loads(
    engine: Engine, service: tinker.ServiceClient, folder: Path
):
    client = trainer(service)
    steps(client, 3, rate=1e-2)
    path = client.save_weights_for_sampler("for-peft").result(WAIT_S).path
    where = engine.rooms.store.folder(parse_path(path))
    model = PeftModel.from_pretrained(type(tiny_model()).from_pretrained(folder), where).eval()
    sampler = service.create_sampling_client(model_path=path).result(WAIT_S)
    tokens = random_tokens(15, 9)
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(tokens[1:, None]))[:, 0].numpy()
    prompt = types.ModelInput.from_ints(tokens.tolist())
    logprobs = sampler.compute_logprobs(prompt).result(WAIT_S)
    assert np.abs(np.array(logprobs[1:]) - expected).max() < 1e-4


def test_training_goes_on_after_a_restart_as_if_there_was_none(folder: Path, tmp_path: Path):
    first = launched(folder, tmp_path)
    client = trainer(connected(first))
    steps(client, 3)
    path = client.save_state("middle").result(WAIT_S).path
    uninterrupted = steps(client, 3)
    first.stop()
    second = launched(folder, tmp_path)
    resumed = connected(second).create_training_client_from_state_with_optimizer(path)
    assert steps(resumed.result(WAIT_S), 3) == pytest.approx(uninterrupted, abs=1e-5)
    second.stop()


def test_without_the_optimizer_training_goes_on_differently(service: tinker.ServiceClient):
    client = trainer(service)
    steps(client, 3)
    path = client.save_state("weights-only").result(WAIT_S).path
    went_on = steps(client, 2)
    fresh = service.create_training_client_from_state(path).result(WAIT_S)
    again = steps(fresh, 2)
    assert again[0] == pytest.approx(went_on[0], abs=1e-4)
    assert abs(again[1] - went_on[1]) > 1e-4


def test_learners_do_not_disturb_each_other(service: tinker.ServiceClient):
    alone = steps(trainer(service), 4)
    one, two = trainer(service), trainer(service, seed=5)
    together = []
    for _ in range(4):
        together += steps(one, 1)
        steps(two, 1, rate=0.1)
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_custom_loss_trains_as_the_built_in_one(service: tinker.ServiceClient):
    def cross_entropy(data: list, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        return -sum(values.sum() for values in logprobs), {}

    built_in, custom = trainer(service), trainer(service)
    for _ in range(3):
        built_in.forward_backward(DATA, "cross_entropy").result(WAIT_S)
        custom.forward_backward_custom(DATA, cross_entropy).result(WAIT_S)
        norms = [
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result(WAIT_S).metrics
            for client in (built_in, custom)
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_targets_of_several_columns_may_be_sparse(service: tinker.ServiceClient):
    length, columns = 6, 8
    targets = torch.zeros(length, columns, dtype=torch.int64)
    weights = torch.zeros(length, columns)
    targets[2, 1], weights[2, 1] = 7, 0.5
    tokens = random_tokens(length, 2).tolist()

    def loss(sparse: bool) -> types.ForwardBackwardOutput:
        wrap = types.TensorData.from_torch_sparse if sparse else types.TensorData.from_torch
        inputs = {"target_tokens": wrap(targets), "weights": wrap(weights)}
        data = [types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)]
        return trainer(service).forward(data, "cross_entropy").result(WAIT_S)

    dense, sparse = loss(False), loss(True)
    assert sparse.metrics["loss:sum"] == pytest.approx(dense.metrics["loss:sum"])
    assert sparse.loss_fn_outputs[0]["logprobs"].shape == [length, columns]


def test_mistakes_in_data_name_the_datum_and_the_field(service: tinker.ServiceClient):
    client = trainer(service)
    wrong = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [1, 2, 3_000], "weights": [1.0] * 3},
    )
    with pytest.raises(tinker.RequestFailedError, match=r"data\[1\].*target_tokens.*3000"):
        client.forward_backward([DATA[0], wrong], "cross_entropy").result(WAIT_S)


def test_the_tokenizer_home_serves_every_name_offline(engine: Engine, tmp_path: Path):
    from transformers import AutoTokenizer

    home = tokenizer_home(tmp_path, engine.models)
    hub = home / "hub"
    tokenizer = AutoTokenizer.from_pretrained("course/base", cache_dir=hub, local_files_only=True)
    assert tokenizer.encode("hi") == tiny_tokenizer().encode("hi")
