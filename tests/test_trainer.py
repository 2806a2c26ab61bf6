"""A training step against the same step by hand with peft and torch; bad input changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny_models import ARCHITECTURES, VOCAB, random_tokens, tiny_model, tiny_tokenizer

from course_lib.engine import scoring
from course_lib.engine.lora import lora_config
from course_lib.engine.model import BaseModel
from course_lib.engine.requests import (
    AdamParams,
    LoraSpec,
    RequestError,
    TrainDatum,
    TrainRequest,
)
from course_lib.engine.trainer import forward_backward, optim_step
from course_lib.losses import LOSSES

SPEC = LoraSpec(rank=4, seed=3)
ADAM = AdamParams(learning_rate=0.02, weight_decay=0.1, grad_clip_norm=1.0)


def tiny_base(architecture: str = "llama") -> BaseModel:
    return BaseModel("tiny", tiny_model(architecture), tiny_tokenizer())


def sft_datum(length: int, seed: int) -> TrainDatum:
    tokens = random_tokens(length + 1, seed)
    weights = np.ones(length, np.float32)
    weights[: length // 2] = 0  # the prompt
    return TrainDatum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})


def rl_datum(length: int, seed: int) -> TrainDatum:
    tokens = random_tokens(length + 1, seed)
    generator = np.random.default_rng(seed)
    return TrainDatum(
        tokens[:-1],
        {
            "target_tokens": tokens[1:],
            "logprobs": -4 * generator.random(length).astype(np.float32),
            "advantages": generator.normal(size=length).astype(np.float32),
            "sequence_ratio_mask": np.ones(length, np.float32),
        },
    )


def without_mask(datum: TrainDatum) -> TrainDatum:
    inputs = {k: v for k, v in datum.loss_fn_inputs.items() if k != "sequence_ratio_mask"}
    return TrainDatum(datum.tokens, inputs)


SFT = [sft_datum(length, length) for length in (6, 11, 11, 3)]


class ByHand:
    """The reference: one datum at a time, peft, torch's AdamW; of ours only the losses."""

    def __init__(self, architecture: str = "llama", spec: LoraSpec = SPEC) -> None:
        model = tiny_model(architecture).eval()
        config = lora_config(model, spec)
        torch.manual_seed(spec.seed or 0)
        self.model = get_peft_model(model, config)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=ADAM.learning_rate,
            betas=(ADAM.beta1, ADAM.beta2),
            eps=ADAM.eps,
            weight_decay=ADAM.weight_decay,
        )

    def backward(self, data: list[TrainDatum], loss_fn: str) -> tuple[list[np.ndarray], float]:
        logprobs, total = [], 0.0
        for datum in data:
            logits = self.model(torch.from_numpy(datum.tokens)[None]).logits[0]
            targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])
            lp = torch.log_softmax(logits, -1).gather(-1, targets.reshape(len(logits), -1))
            lp = lp.reshape(targets.shape)
            inputs = {k: torch.from_numpy(v) for k, v in datum.loss_fn_inputs.items()}
            loss = LOSSES[loss_fn](lp, inputs, {}).sum()
            loss.backward()
            logprobs.append(lp.detach().numpy())
            total += loss.item()
        return logprobs, total

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), ADAM.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def assert_same_tensors(adapter, reference: ByHand, atol: float = 2e-5) -> None:
    expected = {name.replace(".default.", "."): p for name, p in reference.parameters.items()}
    for key, value in adapter.state().items():
        assert torch.allclose(value, expected[key], atol=atol), key


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_steps_equal_peft_and_torch_by_hand(architecture):
    base, reference = tiny_base(architecture), ByHand(architecture)
    adapter = base.new_adapter(SPEC)
    for _ in range(2):
        result = forward_backward(base, adapter, TrainRequest(SFT, "cross_entropy"))
        logprobs, total = reference.backward(SFT, "cross_entropy")
        for output, expected in zip(result.loss_fn_outputs, logprobs, strict=True):
            assert output["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert result.metrics == {"loss:sum": pytest.approx(total, rel=1e-4)}
        norm = optim_step(adapter, ADAM)["grad_norm:mean"]
        assert norm == pytest.approx(reference.step(), rel=1e-3)
    assert norm > ADAM.grad_clip_norm, "the clip was not put to the test"
    assert_same_tensors(adapter, reference, atol=1e-4)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_every_loss_takes_the_step_that_its_formula_says(loss_fn):
    data = [rl_datum(length, length) for length in (5, 9, 9)]
    data = SFT if loss_fn == "cross_entropy" else data
    data = data if loss_fn in ("gspo", "cross_entropy") else [without_mask(d) for d in data]
    base, reference = tiny_base(), ByHand()
    adapter = base.new_adapter(SPEC)
    result = forward_backward(base, adapter, TrainRequest(data, loss_fn))
    _, total = reference.backward(data, loss_fn)
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)
    optim_step(adapter, ADAM)
    reference.step()
    assert_same_tensors(adapter, reference)


@pytest.mark.parametrize("left_out", ["train_mlp", "train_attn", "train_unembed"])
def test_a_partial_adapter_takes_the_right_step(left_out):
    spec = LoraSpec(rank=4, seed=3, **{left_out: False})
    base, reference = tiny_base(), ByHand(spec=spec)
    adapter = base.new_adapter(spec)
    for _ in range(2):
        forward_backward(base, adapter, TrainRequest(SFT, "cross_entropy"))
        reference.backward(SFT, "cross_entropy")
        optim_step(adapter, ADAM)
        reference.step()
    assert_same_tensors(adapter, reference)


def test_several_target_tokens_for_a_position_are_weighted_one_by_one():
    length, width = 7, 3
    generator = np.random.default_rng(0)
    tokens = random_tokens(length)
    targets = generator.integers(0, VOCAB, (length, width))
    weights = generator.random((length, width)).astype(np.float32)
    wide = TrainDatum(tokens, {"target_tokens": targets, "weights": weights})
    narrow = TrainDatum(tokens[:4], {"target_tokens": targets[:4, :2], "weights": weights[:4, :2]})
    data = [wide, SFT[0], narrow]  # (N, 3), (N,) and (N, 2) in one request
    base, reference = tiny_base(), ByHand()
    adapter = base.new_adapter(SPEC)
    result = forward_backward(base, adapter, TrainRequest(data, "cross_entropy"))
    logprobs, total = reference.backward(data, "cross_entropy")
    for output, expected in zip(result.loss_fn_outputs, logprobs, strict=True):
        assert output["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert result.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)
    optim_step(adapter, ADAM)
    reference.step()
    assert_same_tensors(adapter, reference)


def test_the_size_of_micro_batches_does_not_change_the_gradient(monkeypatch):
    base = tiny_base()
    whole, parts = base.new_adapter(SPEC), base.new_adapter(SPEC)
    forward_backward(base, whole, TrainRequest(SFT, "cross_entropy"))
    monkeypatch.setattr(scoring, "ACTIVATION_BYTES", 1)  # one row at a time
    forward_backward(base, parts, TrainRequest(SFT, "cross_entropy"))
    assert torch.allclose(whole.gradients, parts.gradients, rtol=1e-4, atol=1e-3)


def test_gradients_add_up_until_the_step_and_are_gone_after_it():
    base = tiny_base()
    together, apart = base.new_adapter(SPEC), base.new_adapter(SPEC)
    forward_backward(base, together, TrainRequest(SFT, "cross_entropy"))
    for datum in SFT:
        forward_backward(base, apart, TrainRequest([datum], "cross_entropy"))
    assert optim_step(together, ADAM)["grad_norm:mean"] == pytest.approx(
        optim_step(apart, ADAM)["grad_norm:mean"], rel=1e-5
    )
    before = apart.state()
    assert optim_step(apart, ADAM) == {"grad_norm:mean": 0.0}
    assert all(torch.equal(before[key], value) for key, value in apart.state().items())


def test_forward_leaves_no_gradient():
    base = tiny_base()
    adapter = base.new_adapter(SPEC)
    request = TrainRequest(SFT, "cross_entropy", forward_only=True)
    given = forward_backward(base, adapter, request)
    assert adapter.gradients is None
    trained = forward_backward(base, adapter, TrainRequest(SFT, "cross_entropy"))
    assert given.metrics["loss:sum"] == pytest.approx(trained.metrics["loss:sum"])


def test_learners_on_one_base_train_as_if_alone():
    base = tiny_base()
    mine, yours = base.new_adapter(SPEC), base.new_adapter(LoraSpec(rank=8, seed=1))
    forward_backward(base, mine, TrainRequest(SFT[:2], "cross_entropy"))
    forward_backward(base, yours, TrainRequest(SFT[2:], "cross_entropy"))
    forward_backward(base, mine, TrainRequest(SFT[2:], "cross_entropy"))
    optim_step(yours, ADAM)
    optim_step(mine, ADAM)
    reference = ByHand()
    reference.backward(SFT, "cross_entropy")
    reference.step()
    assert_same_tensors(mine, reference)


def test_a_run_goes_on_exactly_after_its_state_was_saved_and_loaded():
    base = tiny_base()
    straight = base.new_adapter(SPEC)
    for _ in range(2):
        forward_backward(base, straight, TrainRequest(SFT, "cross_entropy"))
        optim_step(straight, ADAM)
    resumed = base.new_adapter(LoraSpec(rank=4, seed=99))
    resumed.load_state(straight.state(), straight.optimizer_state())
    for adapter in (straight, resumed):
        forward_backward(base, adapter, TrainRequest(SFT, "cross_entropy"))
        optim_step(adapter, ADAM)
    state = resumed.state()
    assert all(torch.equal(state[key], value) for key, value in straight.state().items())


def test_an_optimizer_that_never_stepped_has_an_empty_state():
    base = tiny_base()
    adapter = base.new_adapter(SPEC)
    assert adapter.optimizer_state() == {}
    adapter.load_state(adapter.state(), {})
    assert adapter.optimizer_state() == {}


HEAD = "base_model.model.lm_head.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda moments: moments.pop(f"{HEAD}.exp_avg"), f"optimizer state lacks {HEAD}"),
        (lambda moments: moments[f"{HEAD}.step"].add_(1), "differ in steps"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_changes_nothing(spoil, words):
    """The weights had been taken over, and the moments thrown away, when it was refused."""
    base = tiny_base()
    adapter, straight = base.new_adapter(SPEC), base.new_adapter(SPEC)
    for each in (adapter, straight):
        forward_backward(base, each, TrainRequest(SFT, "cross_entropy"))
        optim_step(each, ADAM)
        forward_backward(base, each, TrainRequest(SFT, "cross_entropy"))
    other = {key: value + 1 for key, value in adapter.state().items()}
    moments = adapter.optimizer_state()
    spoil(moments)
    with pytest.raises(RequestError, match=words):
        adapter.load_state(other, moments)
    for each in (adapter, straight):
        optim_step(each, ADAM)
    state = adapter.state()
    assert all(torch.equal(state[key], value) for key, value in straight.state().items())


def spoilt(datum: TrainDatum, **inputs: object) -> TrainDatum:
    return TrainDatum(datum.tokens, datum.loss_fn_inputs | inputs)


GOOD = SFT[0]  # six tokens
BAD = {
    "no weights": (
        TrainDatum(GOOD.tokens, {"target_tokens": GOOD.tokens}),
        r"data\[1\].loss_fn_inputs lacks 'weights'; cross_entropy takes target_tokens, weights",
    ),
    "an input that cross_entropy does not use": (
        spoilt(GOOD, advantages=np.ones(6, np.float32)),
        r"data\[1\].loss_fn_inputs\['advantages'\] is not used by cross_entropy",
    ),
    "weights too short": (
        spoilt(GOOD, weights=np.ones(5, np.float32)),
        r"\['weights'\] has shape \(5,\); it must be \(6,\)",
    ),
    "targets too short": (
        spoilt(GOOD, target_tokens=GOOD.tokens[:5]),
        r"\['target_tokens'\] has shape \(5,\); it must be \(6,\) or \(6, K\)",
    ),
    "a target outside the vocabulary": (
        spoilt(GOOD, target_tokens=np.full(6, VOCAB)),
        rf"\['target_tokens'\] holds token {VOCAB}; the vocabulary has 0 to {VOCAB - 1}",
    ),
    "a token outside the vocabulary": (
        TrainDatum(np.array([1, -2, 3, 4, 5, 6]), GOOD.loss_fn_inputs),
        r"data\[1\].model_input holds token -2",
    ),
    "weights that are no number": (
        spoilt(GOOD, weights=np.array([1, 1, math.nan, 1, 1, 1], np.float32)),
        r"\['weights'\] holds a value that is not finite",
    ),
    "nothing": (
        TrainDatum(np.zeros(0, np.int64), GOOD.loss_fn_inputs),
        r"data\[1\].model_input is empty",
    ),
    "more than the context": (
        sft_datum(129, 0),
        r"data\[1\].model_input has 129 tokens; the model's context window is 128",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_datum_is_named_and_changes_no_gradient(name):
    datum, words = BAD[name]
    base = tiny_base()
    adapter = base.new_adapter(SPEC)
    forward_backward(base, adapter, TrainRequest(SFT, "cross_entropy"))
    before = adapter.gradients.clone()
    with pytest.raises(RequestError, match=words):
        forward_backward(base, adapter, TrainRequest([GOOD, datum], "cross_entropy"))
    assert torch.equal(before, adapter.gradients)


def test_a_loss_that_overflows_changes_no_gradient():
    base = tiny_base()
    adapter = base.new_adapter(SPEC)
    good, bad = without_mask(rl_datum(9, 0)), without_mask(rl_datum(6, 1))
    forward_backward(base, adapter, TrainRequest([good], "importance_sampling"))
    before = adapter.gradients.clone()
    bad = spoilt(bad, logprobs=np.full(6, -1000.0, np.float32))  # a ratio of exp(1000)
    with pytest.raises(RequestError, match=r"loss is (-?inf|nan)"):
        forward_backward(base, adapter, TrainRequest([good, bad], "importance_sampling"))
    assert torch.equal(before, adapter.gradients)


@pytest.mark.parametrize("size", [math.nan, 1e30])
def test_weights_that_blew_up_are_named_and_not_the_sampling_logprobs(size: float):
    base = tiny_base()
    adapter = base.new_adapter(SPEC)
    adapter.flat.data.fill_(size)
    with pytest.raises(RequestError, match="training has blown up; go back"):
        forward_backward(base, adapter, TrainRequest(SFT, "cross_entropy"))


@pytest.mark.parametrize(
    ("loss_fn", "cause"),
    [("cross_entropy", "training has blown up"), ("importance_sampling", "are the sampling")],
)
def test_a_gradient_that_overflows_is_named_with_its_cause(loss_fn: str, cause: str):
    """The loss is a number still, and after SFT nobody has sampled."""
    base = tiny_base()
    adapter = base.new_adapter(SPEC)
    adapter.flat.data.mul_(1e6)  # A; B is zero
    datum = SFT[0] if loss_fn == "cross_entropy" else without_mask(rl_datum(9, 0))
    scaled = "weights" if loss_fn == "cross_entropy" else "advantages"
    huge = spoilt(datum, **{scaled: datum.loss_fn_inputs[scaled] * np.float32(1e35)})
    with pytest.raises(RequestError, match=f"the gradient is not finite; {cause}"):
        forward_backward(base, adapter, TrainRequest([huge], loss_fn))
    assert adapter.gradients is None


def test_several_targets_are_for_cross_entropy_alone():
    base = tiny_base()
    inputs = {"target_tokens": np.zeros((6, 2), np.int64)}
    inputs |= {name: np.zeros((6, 2), np.float32) for name in ("logprobs", "advantages")}
    with pytest.raises(RequestError, match=r"shape \(6, 2\); it must be \(6,\)$"):
        request = TrainRequest([TrainDatum(GOOD.tokens, inputs)], "ppo")
        forward_backward(base, base.new_adapter(SPEC), request)


def test_an_unknown_loss_is_told_what_there_is():
    base = tiny_base()
    with pytest.raises(RequestError, match=r"'stable_reinforce' is not here; there is cross_entro"):
        forward_backward(base, base.new_adapter(SPEC), TrainRequest(SFT, "stable_reinforce"))


def test_an_unknown_setting_of_a_loss_is_a_request_error():
    base = tiny_base()
    with pytest.raises(RequestError, match="'clip' is unknown"):
        request = TrainRequest(SFT, "cross_entropy", {"clip": 1.0})
        forward_backward(base, base.new_adapter(SPEC), request)


def test_a_request_without_data_is_refused():
    base = tiny_base()
    with pytest.raises(RequestError, match="data is empty"):
        forward_backward(base, base.new_adapter(SPEC), TrainRequest([], "cross_entropy"))


FIELDS = ["learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"]
WITHOUT_MEANING = [(field, value) for field in FIELDS for value in (-1.0, math.nan, math.inf)]


@pytest.mark.parametrize(("field", "value"), [*WITHOUT_MEANING, ("eps", 0.0)])
def test_optimizer_settings_without_a_meaning_are_refused(field, value):
    base = tiny_base()
    adapter = base.new_adapter(SPEC)
    forward_backward(base, adapter, TrainRequest(SFT, "cross_entropy"))
    before = adapter.state()
    with pytest.raises(RequestError, match=f"{field} is"):
        optim_step(adapter, AdamParams(**{field: value}))
    assert all(torch.equal(before[key], value) for key, value in adapter.state().items())
    assert adapter.gradients is not None
