"""Weights in oneDNN's order: the same products, where they work and are worth it."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch
from test_sampler import sample, trained_adapter, trainer_logprobs
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

from course_lib.engine import reorder
from course_lib.engine.model import BaseModel
from course_lib.engine.requests import SampleRequest
from course_lib.engine.sampler import Sampler

ROWS = 70
MUCH = 2 * reorder.REORDER_AT // ROWS  # tokens of so many rows after which weights are arranged

usable = pytest.mark.skipif(not reorder.works(), reason="this processor or torch has none of it")


@usable
@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_products_are_those_of_the_weight_as_it_was(rows: int):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(300, 200, generator=generator)
    x, to = (torch.randn(rows, width, generator=generator) for width in (200, 300))
    own = reorder.reordered(weight)
    assert own is not None
    assert torch.allclose(reorder.product(x, own), x @ weight.T, atol=1e-4)
    assert torch.allclose(reorder.product_added(to, x, own), to + x @ weight.T, atol=1e-4)


def test_small_weights_and_few_rows_are_left_alone():
    assert reorder.reordered(torch.ones(100, 100)) is None
    weight = torch.ones(1024, 128)
    assert not reorder.worth_it(torch.ones(4, 128), weight)
    assert reorder.worth_it(torch.ones(64, 128), weight)


def test_another_processor_keeps_its_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    reorder.works.cache_clear()
    try:
        assert reorder.reordered(torch.ones(1024, 128)) is None
    finally:
        reorder.works.cache_clear()


def wide_base() -> BaseModel:
    """A miniature with weights that are worth it: 2048 x 64 of the MLP."""
    model = tiny_model(hidden_size=64, intermediate_size=1024, head_dim=16)
    return BaseModel("wide", model, tiny_tokenizer())


@usable
def test_what_is_sampled_with_them_is_what_the_trainer_says():
    base = wide_base()
    adapter, prompt = trained_adapter(base), random_tokens(5)
    result = sample(base, SampleRequest(prompt, ROWS, max_tokens=MUCH, seed=1, stop=[]), adapter)
    layer = base.snapshot_weights(adapter.state()).layers[0]
    assert layer.gate_up.reordered is not None and layer.out.reordered is None
    for sequence in result.sequences[::23]:
        expected = trainer_logprobs(base, adapter, prompt, sequence.tokens)
        assert np.abs(np.array(sequence.logprobs) - expected).max() < 1e-4


@usable
def test_a_model_that_would_fill_the_memory_twice_keeps_its_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("course_lib.engine.llama.ROOM", 1000)
    base = wide_base()
    adapter = trained_adapter(base)
    sample(base, SampleRequest(random_tokens(5), ROWS, max_tokens=MUCH, stop=[]), adapter)
    assert base.snapshot_weights(adapter.state()).layers[0].gate_up.reordered is None


@usable
def test_weights_are_arranged_once_they_are_much_used():
    weights = wide_base().snapshot_weights(None)
    weights.expect(1)
    assert weights.layers[0].gate_up.reordered is None
    weights.expect(reorder.REORDER_AT)
    assert weights.layers[0].gate_up.reordered is not None


@usable
def test_deterministic_decoding_rounds_alike_before_and_after_much_use():
    base, prompt = wide_base(), random_tokens(5)
    sampler = Sampler(base, deterministic=True)
    weights, found = base.sampler_weights(None), []
    for _ in range(3):
        request = SampleRequest(prompt, ROWS, max_tokens=MUCH, seed=1, stop=[])
        future = sampler.submit(request, weights)
        sampler.run_until_idle()
        found.append([sequence.logprobs for sequence in future.result().sequences])
    assert found[0] == found[1] == found[2]
