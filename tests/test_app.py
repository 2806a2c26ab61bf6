"""The protocol, spoken by the unmodified SDK over loopback to an engine with a stand-in for torch.

Everything runs under the three client configurations that a Tinker server may hand out, since each
makes the SDK use other endpoints, and once more over the HTTP client that `connect()` gives it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator

import pytest
import tinker
import torch
from engine_desk import CONFIGS, PROMPT, WAIT_S, Desk, datum, sampled
from fake_compute import POISON
from tinker import types

from course_lib.engine.names import parse_path


@pytest.fixture(scope="module", params=CONFIGS)
def desk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    store, loopback = tmp_path_factory.mktemp("store"), "loopback" in request.param
    desk = Desk(store, CONFIGS[request.param], loopback=loopback)
    yield desk
    desk.close()


def test_training_steps_give_outputs_in_order_and_the_gradient_norm(desk: Desk):
    client = desk.trainer(rank=8)
    assert client.get_info().lora_rank == 8
    data = [datum(first, 2 + first) for first in range(1, 6)]  # three chunks of at most two
    result = client.forward_backward(data, "cross_entropy").result(WAIT_S)
    shapes = [output["logprobs"].shape for output in result.loss_fn_outputs]
    assert shapes == [[3], [4], [5], [6], [7]]
    assert [output["logprobs"].tolist()[0] for output in result.loss_fn_outputs] == pytest.approx(
        [-0.01, -0.02, -0.03, -0.04, -0.05]
    )
    assert result.metrics["loss:sum"] == 5.0
    metrics = client.optim_step(types.AdamParams()).result(WAIT_S).metrics
    assert any("grad_norm" in name and name.count(":") == 1 for name in metrics)
    assert metrics["grad_norm:mean"] == 5.0


def test_forward_leaves_no_gradient(desk: Desk):
    client = desk.trainer()
    client.forward([datum()], "cross_entropy").result(WAIT_S)
    assert client.optim_step(types.AdamParams()).result(WAIT_S).metrics["grad_norm:mean"] == 0.0


def test_a_custom_loss_in_the_client_gives_its_own_metrics(desk: Desk):
    def loss(data: list, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -sum(values.sum() for values in logprobs), {"mine": 7.0}

    client = desk.trainer()
    result = client.forward_backward_custom([datum()] * 3, loss)
    stepped = client.optim_step(types.AdamParams())
    assert result.result(WAIT_S).metrics["mine"] == 7.0
    assert {"loss:sum", "surrogate_loss:sum"} <= set(result.result().metrics)
    assert stepped.result(WAIT_S).metrics["grad_norm:mean"] == 3.0


def test_a_traced_custom_loss_runs_in_the_client(desk: Desk):
    def neg_ll(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict]:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/neg_ll:sum": loss}

    handle = desk.service.create_custom_loss(neg_ll, {"logprobs": 1, "weights": 1})
    client = desk.trainer()
    result = client.forward_backward_custom([datum()], handle.result(WAIT_S)).result(WAIT_S)
    assert "custom/neg_ll:sum" in result.metrics


def test_state_comes_back_with_and_without_the_optimizer(desk: Desk):
    client = desk.trainer(rank=4)
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(types.AdamParams()).result(WAIT_S)
    path = client.save_state("after-one").result(WAIT_S).path
    assert path == f"tinker://{client.model_id}/weights/after-one"
    without = desk.service.create_training_client_from_state(path).result(WAIT_S)
    with_optimizer = desk.service.create_training_client_from_state_with_optimizer(path)
    assert without.get_info().lora_rank == 4
    metrics = without.optim_step(types.AdamParams()).result(WAIT_S).metrics
    assert metrics == {"grad_norm:mean": 1.0, "steps:max": 1.0}
    metrics = with_optimizer.result(WAIT_S).optim_step(types.AdamParams()).result(WAIT_S).metrics
    assert metrics == {"grad_norm:mean": 1.0, "steps:max": 2.0}


@pytest.mark.filterwarnings("ignore:DEPRECATED")
def test_load_state_replaces_weights_and_drops_gradients(desk: Desk):
    client = desk.trainer()
    path = client.save_state("empty").result(WAIT_S).path
    client.forward_backward([datum()], "cross_entropy").result(WAIT_S)
    client.optim_step(types.AdamParams()).result(WAIT_S)
    client.forward_backward([datum()], "cross_entropy").result(WAIT_S)
    client.load_state_with_optimizer(path).result(WAIT_S)
    metrics = client.optim_step(types.AdamParams()).result(WAIT_S).metrics
    assert metrics == {"grad_norm:mean": 0.0, "steps:max": 1.0}


@pytest.mark.filterwarnings("ignore:DEPRECATED")
@pytest.mark.parametrize(
    ("options", "finding"),
    [({"rank": 8}, "has rank 4, this run 8"), ({"train_mlp": False}, "has train_mlp True, this")],
)
def test_state_of_another_shape_is_told_with_a_client_that_fits(
    desk: Desk, options: dict, finding: str
):
    """It was told by the shape of the first matrix that did not fit."""
    path = desk.trainer(rank=4).save_state("of-rank-4").result(WAIT_S).path
    with pytest.raises(tinker.RequestFailedError, match=f"{finding}.*client_from_state makes"):
        desk.trainer(**{"rank": 4} | options).load_state(path).result(WAIT_S)


def test_a_sampler_uses_the_weights_it_was_made_from(desk: Desk):
    client = desk.trainer()
    before = client.save_weights_and_get_sampling_client().result(WAIT_S)
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(types.AdamParams()).result(WAIT_S)
    path = client.save_weights_for_sampler("trained").result(WAIT_S).path
    after = desk.service.create_sampling_client(model_path=path).result(WAIT_S)
    base = desk.service.create_sampling_client(base_model="course/base").result(WAIT_S)
    logprobs = [sampled(each).sequences[0].logprobs for each in (before, after, base)]
    assert logprobs == [[-1.0, -1.0], [0.0, 0.0], [-1.0, -1.0]]
    assert after.get_base_model() == "course/base"


def test_a_sampler_does_not_take_the_weights_that_replaced_its_own(desk: Desk):
    """They are read at the first sample, and it sampled from whatever had the name by then."""
    client = desk.trainer()
    path = client.save_state("one").result(WAIT_S).path
    early = desk.service.create_sampling_client(model_path=path).result(WAIT_S)
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(types.AdamParams()).result(WAIT_S)
    client.save_state("one", overwrite=True).result(WAIT_S)
    with pytest.raises(tinker.RequestFailedError, match=r"was replaced .*make the sampler again"):
        sampled(early)
    again = desk.service.create_sampling_client(model_path=path).result(WAIT_S)
    assert sampled(again).sequences[0].logprobs == [0.0, 0.0]


def test_inflight_samplers_follow_the_newest_weights(desk: Desk):
    client = desk.trainer()
    old = client.save_weights_and_get_sampling_client(kind="inflight").result(WAIT_S)
    snapshot = client.save_weights_and_get_sampling_client().result(WAIT_S)
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(types.AdamParams()).result(WAIT_S)
    client.save_weights_and_get_sampling_client(kind="inflight").result(WAIT_S)
    assert sampled(old).sequences[0].logprobs == [0.0, 0.0]
    assert sampled(snapshot).sequences[0].logprobs == [-1.0, -1.0]


def test_sampling_gives_every_kind_of_logprobs(desk: Desk):
    client = desk.service.create_sampling_client(base_model="course/base").result(WAIT_S)
    target = types.TensorData(data=[7, -1, 8], dtype="int64", shape=[3, 1])
    response = sampled(
        client,
        n=3,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=2,
        target_prompt_logprobs=target,
        prompt_alt_tokens_k=2,
    )
    assert [sequence.tokens for sequence in response.sequences] == [[1, 2]] * 3
    assert len({sequence.sequence_id for sequence in response.sequences}) == 3
    assert response.prompt_logprobs[0] is None
    assert response.prompt_logprobs[1:] == pytest.approx([-0.02, -0.03, -0.04])
    assert response.topk_prompt_logprobs[1] == [(3, pytest.approx(-0.3)), (4, pytest.approx(-0.4))]
    assert response.sequences[0].topk_logprobs_np.token_ids.tolist() == [[1, 2], [1, 2]]
    scored = response.target_prompt_logprobs.to_numpy()
    assert scored == pytest.approx(torch.tensor([[-0.07], [0.0], [-0.08]]).numpy())
    assert response.prompt_alt_tokens.tokens.to_numpy().tolist() == [[7, 7]] * 3


def test_sparse_targets_come_back_sparse(desk: Desk):
    client = desk.service.create_sampling_client(base_model="course/base").result(WAIT_S)
    ids = torch.full((3, 40), -1, dtype=torch.int64)
    ids[2, 5] = 9
    target = types.TensorData.from_torch_sparse(ids, pad_value=-1)
    scored = sampled(client, target_prompt_logprobs=target).target_prompt_logprobs
    assert scored.sparse_col_indices == [5]
    assert scored.to_torch()[2, 5].item() == pytest.approx(-0.09)


def test_compute_logprobs_begins_with_none(desk: Desk):
    client = desk.service.create_sampling_client(base_model="course/base").result(WAIT_S)
    logprobs = client.compute_logprobs(PROMPT).result(WAIT_S)
    assert logprobs[0] is None and logprobs[1:] == pytest.approx([-0.02, -0.03, -0.04])
    assert client.compute_logprobs(PROMPT, 1).result(WAIT_S) == [None] * 3 + [pytest.approx(-0.04)]


def test_sixty_samples_at_once_are_decoded_together(desk: Desk):
    client = desk.service.create_sampling_client(base_model="course/base").result(WAIT_S)
    sampled(client)
    sampler = desk.compute.samplers[0]
    sampler.step_s = 0.01
    params = types.SamplingParams(max_tokens=20)
    try:
        futures = [client.sample(PROMPT, 1, params) for _ in range(60)]
        assert all(len(f.result(WAIT_S).sequences[0].tokens) == 20 for f in futures)
    finally:
        sampler.step_s = 0.0
    assert max(sampler.batch_sizes) > 30


def test_copies_of_a_sampler_sample_from_the_same_weights(desk: Desk):
    client = desk.trainer().save_weights_and_get_sampling_client().result(WAIT_S)
    copies = [pickle.loads(pickle.dumps(client)) for _ in range(2)]
    handle = client.get_sampler_handle()
    copies.append(tinker.SamplingClient.from_sampler_handle(handle, api_key=desk.engine.api_key))
    for copy in [client, *copies]:
        assert sampled(copy).sequences[0].tokens == [1, 2]


def test_an_alias_is_the_same_model_by_another_name(desk: Desk):
    names = [m.model_name for m in desk.rest.get_server_capabilities().result().supported_models]
    assert names == ["course/base", "org/alias"]
    client = desk.service.create_lora_training_client(base_model="org/alias").result(WAIT_S)
    assert client.get_info().model_data.model_name == "org/alias"


def test_a_failing_request_is_one_failed_future_with_a_sentence(desk: Desk):
    client = desk.trainer()
    failing = client.forward_backward([datum()], "stable_reinforce")
    with pytest.raises(tinker.RequestFailedError, match="there is cross_entropy"):
        failing.result(WAIT_S)
    client.forward_backward([datum()], "cross_entropy").result(WAIT_S)
    assert client.optim_step(types.AdamParams()).result(WAIT_S).metrics["grad_norm:mean"] == 1.0


def test_a_bug_in_the_engine_is_a_failed_future_too(desk: Desk):
    client = desk.trainer()
    with pytest.raises(tinker.RequestFailedError, match="ZeroDivisionError: a bug"):
        client.forward_backward([datum(POISON)], "cross_entropy").result(WAIT_S)
    client.forward_backward([datum()], "cross_entropy").result(WAIT_S)


@pytest.mark.parametrize(
    ("act", "finding"),
    [
        (lambda c: c.save_state("../out"), "cannot be used"),
        (lambda c: c.save_state("x" * 10_000), "cannot be used"),
        (lambda c: c.save_state("a\0b"), "cannot be used"),
        (lambda c: c.save_state("name", ttl_seconds=5), "ttl_seconds is 5"),
        (lambda c: c.save_state("name", user_metadata={"k": "v" * 100_000}), "user_metadata"),
        (lambda c: c.optim_step(types.DimuonParams(learning_rate=1e-3)), "use AdamParams"),
        (
            lambda c: c.save_weights_external("x", age_encryption_recipients=["nonsense"]),
            "neither an age1... key",
        ),
    ],
)
def test_a_mistake_is_told_in_a_sentence(desk: Desk, act: Callable, finding: str):
    client = desk.trainer()
    with pytest.raises(tinker.RequestFailedError, match=finding):
        act(client).result(WAIT_S)
    assert client.optim_step(types.AdamParams()).result(WAIT_S).metrics


def test_a_name_is_taken_once(desk: Desk):
    client = desk.trainer()
    client.save_state("same").result(WAIT_S)
    with pytest.raises(tinker.RequestFailedError, match=r"exists already.*overwrite=True"):
        client.save_state("same").result(WAIT_S)
    client.save_state("same", overwrite=True).result(WAIT_S)


def test_what_is_not_there_is_said_at_once(desk: Desk):
    with pytest.raises(tinker.BadRequestError, match="'org/none' is not served"):
        desk.service.create_lora_training_client(base_model="org/none").result(WAIT_S)
    with pytest.raises(tinker.NotFoundError, match="There is no checkpoint"):
        desk.service.create_training_client_from_state("tinker://a:train:0/weights/x").result(
            WAIT_S
        )
    with pytest.raises(tinker.BadRequestError, match="is not a training run id"):
        desk.service.create_sampling_client(model_path="tinker://../weights/x").result(WAIT_S)
    with pytest.raises(tinker.RequestFailedError, match="rank is 0"):
        desk.service.create_lora_training_client(base_model="course/base", rank=0).result(WAIT_S)
    with pytest.raises(tinker.BadRequestError, match=r"context window: 4 \+ 500 > 128"):
        client = desk.service.create_sampling_client(base_model="course/base").result(WAIT_S)
        sampled(client, max_tokens=500)


def test_damaged_weights_fail_their_own_request(desk: Desk):
    path = desk.trainer().save_state("good").result(WAIT_S).path
    folder = desk.engine.rooms.store.folder(parse_path(path))
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(tinker.RequestFailedError, match="cannot be read"):
        desk.service.create_training_client_from_state(path).result(WAIT_S)
    sampler = desk.service.create_sampling_client(model_path=path).result(WAIT_S)
    with pytest.raises(tinker.RequestFailedError, match="cannot be read"):
        sampled(sampler)
    assert desk.trainer().model_id


def test_a_checkpoint_of_another_base_model_is_refused(desk: Desk):
    path = desk.trainer().save_state("theirs").result(WAIT_S).path
    model = desk.engine.rooms.models["org/alias"]
    model.fingerprint = "other"
    try:
        with pytest.raises(tinker.RequestFailedError, match="another base model"):
            future = desk.service.create_training_client_from_state(path, base_model="org/alias")
            future.result(WAIT_S)
    finally:
        model.fingerprint = "fake"
