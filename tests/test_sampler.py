"""What is sampled follows the model's own distribution, whoever else is being decoded."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, END, VOCAB, random_tokens, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache

from course_lib.engine import cache, prompts
from course_lib.engine import sampler as sampler_module
from course_lib.engine.cache import GroupedCache
from course_lib.engine.decoding import Batch
from course_lib.engine.forwards import LlamaForward
from course_lib.engine.llama import Llama
from course_lib.engine.model import BaseModel, agreeing_llama
from course_lib.engine.picking import Drawing, truncated, uniforms
from course_lib.engine.requests import (
    AdamParams,
    LoraSpec,
    RequestError,
    SampleRequest,
    TrainDatum,
    TrainRequest,
)
from course_lib.engine.sampler import Sampler
from course_lib.engine.trainer import forward_backward, optim_step


def tiny_base(architecture: str = "llama", **changes: object) -> BaseModel:
    return BaseModel("tiny", tiny_model(architecture, **changes), tiny_tokenizer())


def trained_adapter(base: BaseModel, seed: int = 0):
    """An adapter that changes what the model says."""
    adapter = base.new_adapter(LoraSpec(rank=4, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: value.shape for key, value in adapter.state().items()}
    adapter.load_state({k: 0.1 * torch.randn(v, generator=generator) for k, v in shapes.items()})
    return adapter


def trainer_logprobs(base: BaseModel, adapter, prompt, tokens) -> np.ndarray:
    """log p of a completion, as `forward` gives it."""
    full = np.concatenate([prompt, tokens])
    inputs = {"target_tokens": full[1:], "weights": np.zeros(len(full) - 1, np.float32)}
    request = TrainRequest([TrainDatum(full[:-1], inputs)], "cross_entropy", forward_only=True)
    outputs = forward_backward(base, adapter, request).loss_fn_outputs
    return outputs[0]["logprobs"][len(prompt) - 1 :]


def full_logits(base: BaseModel, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return base.plain(torch.from_numpy(tokens)[None]).logits[0]


def sample(base: BaseModel, request: SampleRequest, adapter=None, **options):
    sampler = Sampler(base, **options)
    future = sampler.submit(request, base.sampler_weights(adapter and adapter.state()))
    sampler.run_until_idle()
    return future.result(timeout=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (3, 20, 1), (30,)])
@pytest.mark.parametrize("stop", [[], [*range(0, VOCAB, 20)]], ids=["no stop", "stops"])
def test_samples_that_share_their_prompt_are_those_of_copies(kv_heads, lengths, stop, monkeypatch):
    """Until half of them have ended, or another request joins; and they are the trainer's, too."""
    base = tiny_base(num_key_value_heads=kv_heads)
    adapter = trained_adapter(base)
    weights = base.sampler_weights(adapter.state())
    steps = {GroupedCache: 0, Cache: 0}
    forward = LlamaForward.next

    def counted(self, weights, tokens, start, cache):
        steps[type(cache)] += 1
        return forward(self, weights, tokens, start, cache)

    monkeypatch.setattr(LlamaForward, "next", counted)

    def results(shared_at: int, joins_after: int = 0):
        monkeypatch.setattr(cache, "SHARED_AT", shared_at)
        steps.update({GroupedCache: 0, Cache: 0})
        sampler, futures = Sampler(base), []
        for seed, length in enumerate(lengths):
            prompt = random_tokens(length, length)
            request = SampleRequest(prompt, 5, max_tokens=60, seed=9 * seed, stop=stop)
            futures.append((prompt, sampler.submit(request, weights)))
        if joins_after:
            for _ in range(joins_after):
                sampler.step()
            request = SampleRequest(random_tokens(7, 7), 1, max_tokens=9, seed=99, stop=[])
            futures.append((request.prompt, sampler.submit(request, weights)))
        sampler.run_until_idle()
        return [(prompt, future.result(timeout=0).sequences) for prompt, future in futures]

    copied = results(10**9)
    assert steps[GroupedCache] == 0 < steps[Cache]
    shared = results(1)
    assert steps[GroupedCache] > 0 and (steps[Cache] > 0) == bool(stop)
    joined = results(1, joins_after=4)
    assert 0 < steps[GroupedCache] <= 4 and steps[Cache] > 0
    assert len(joined) == len(lengths) + 1
    for (prompt, expected), *others in zip(copied, shared, joined[:-1], strict=True):
        for _, sequences in others:
            assert [each.tokens for each in sequences] == [each.tokens for each in expected]
        for sequence in others[0][1]:
            logprobs = trainer_logprobs(base, adapter, prompt, sequence.tokens)
            assert np.abs(np.array(sequence.logprobs) - logprobs).max() < 1e-4


def test_where_groups_part_only_the_rows_that_live_are_copied(monkeypatch):
    """Those that had ended were, too: twice the memory, for a moment."""
    monkeypatch.setattr(cache, "SHARED_AT", 1)
    base, copied = tiny_base(), []
    sampler, write = Sampler(base), cache.SlabLayer.write

    def counted(self, keys, values):
        if keys.shape[2] > 9 and not self.is_initialized:  # a prompt and more
            copied.append(len(keys))
        return write(self, keys, values)

    monkeypatch.setattr(cache.SlabLayer, "write", counted)
    request = SampleRequest(random_tokens(9), 20, max_tokens=60, seed=0, stop=[*range(0, VOCAB, 9)])
    sampler.submit(request, base.sampler_weights(None))
    while not copied:
        assert sampler.step()
    (batch,) = sampler._batches.values()
    assert copied == [len(batch.rows)] * len(batch.cache.layers) and copied[0] <= 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_logprobs_are_those_of_the_trainer(architecture):
    """The importance ratio at step 0 is 1, for rows of any length that were decoded together."""
    base = tiny_base(architecture)
    adapter = trained_adapter(base)
    weights = base.sampler_weights(adapter.state())
    sampler = Sampler(base)
    prompts = [random_tokens(length, length) for length in (3, 9, 1, 30)]
    futures = []
    for prompt in prompts:  # each joins while the earlier ones are being decoded
        stop = list(range(0, VOCAB, 9))  # so that rows end at different times
        request = SampleRequest(prompt, 3, max_tokens=25, seed=len(prompt), stop=stop)
        futures.append(sampler.submit(request, weights))
        sampler.step()
        sampler.step()
    sampler.run_until_idle()
    lengths = set()
    for prompt, future in zip(prompts, futures, strict=True):
        for sequence in future.result(timeout=0).sequences:
            expected = trainer_logprobs(base, adapter, prompt, sequence.tokens)
            assert np.abs(np.array(sequence.logprobs) - expected).max() < 1e-4
            lengths.add(len(sequence.tokens))
    assert len(lengths) > 1, "no row ended early: leaving the batch was not put to the test"


def test_greedy_is_the_argmax_of_the_model_at_every_step():
    base = tiny_base()
    prompt = random_tokens(6)
    result = sample(base, SampleRequest(prompt, max_tokens=12, temperature=0.0, stop=[]))
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(full_logits(base, np.array(tokens))[-1].argmax()))
    assert result.sequences[0].tokens == tokens[6:]
    expected = torch.log_softmax(full_logits(base, np.array(tokens))[5:-1], -1).amax(-1)
    assert result.sequences[0].logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_reported_logprobs_are_temperature_scaled_and_not_truncated():
    base = tiny_base()
    prompt = random_tokens(6)
    request = SampleRequest(prompt, max_tokens=5, temperature=0.5, top_k=2, top_p=0.9, seed=1)
    sequence = sample(base, request).sequences[0]
    logits = full_logits(base, np.concatenate([prompt, sequence.tokens]))[5:-1]
    expected = torch.log_softmax(logits / 0.5, -1)[range(len(sequence.tokens)), sequence.tokens]
    assert sequence.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def draws(logits: list[float], count: int = 20_000, **settings: float) -> np.ndarray:
    """How often each token is picked, as shares."""
    how = Drawing.of(
        [settings.get("temperature", 1.0)] * count,
        [int(settings.get("top_k", -1))] * count,
        [settings.get("top_p", 1.0)] * count,
        torch.device("cpu"),
    )
    seeds = np.arange(count, dtype=np.uint64)
    rows = torch.tensor(logits).expand(count, -1)
    tokens = how.pick(rows, how.probs(rows), uniforms(seeds, np.zeros(count, dtype=np.int64)))
    return np.bincount(tokens.numpy(), minlength=len(logits)) / count


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.3, 0.2)]


def test_tokens_are_drawn_with_their_probabilities():
    # The standard error is at most 0.0035, and the seeds are fixed.
    assert draws(LOGITS) == pytest.approx([0.1, 0.4, 0.3, 0.2], abs=0.02)


def test_a_greedy_rows_probabilities_are_unscaled_beside_a_row_that_is_scaled():
    how = Drawing.of([0.0, 0.5], [-1, -1], [1.0, 1.0], torch.device("cpu"))
    probs = how.probs(torch.tensor([LOGITS, LOGITS]))
    assert probs[0].tolist() == pytest.approx([0.1, 0.4, 0.3, 0.2])
    assert probs[1].tolist() == pytest.approx([p * p / 0.3 for p in (0.1, 0.4, 0.3, 0.2)])


def test_top_k_keeps_the_likeliest_and_shares_out_the_rest():
    assert draws(LOGITS, top_k=2) == pytest.approx([0, 4 / 7, 3 / 7, 0], abs=0.02)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert draws(LOGITS, top_p=0.6) == pytest.approx([0, 4 / 7, 3 / 7, 0], abs=0.02)
    assert draws(LOGITS, top_p=0.39) == pytest.approx([0, 1, 0, 0])
    assert draws(LOGITS, top_p=1e-6) == pytest.approx([0, 1, 0, 0])
    exact = torch.tensor([[0.25, 0.5, 0.25]])  # the likeliest alone reaches a half, no more is kept
    assert truncated(exact.log(), exact, torch.tensor([-1]), torch.tensor([0.5])).tolist() == [
        [0, 0.5, 0]
    ]


def test_at_a_high_temperature_the_likeliest_are_still_kept():
    """All probabilities round to the same there, and the first tokens were taken."""
    assert draws(LOGITS, top_k=1, temperature=1e9) == pytest.approx([0, 1, 0, 0])
    assert draws(LOGITS, top_p=0.5, temperature=1e9) == pytest.approx([0, 0.5, 0.5, 0], abs=0.02)


def test_top_k_larger_than_the_vocabulary_is_off():
    assert draws(LOGITS, top_k=50) == pytest.approx(draws(LOGITS))


def test_an_impossible_token_is_never_drawn():
    assert draws([0.0, -math.inf, 0.0, -math.inf])[[1, 3]].sum() == 0


def test_uniform_numbers_are_uniform_and_differ_between_seeds_and_draws():
    seeds = np.repeat(np.arange(100, dtype=np.uint64), 100)
    numbers = uniforms(seeds, np.tile(np.arange(100), 100))
    assert len(np.unique(numbers)) == 10_000
    assert np.histogram(numbers, bins=10, range=(0, 1))[0] == pytest.approx([1000] * 10, abs=150)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05


def test_a_seed_gives_the_same_tokens_alone_and_in_company():
    base = tiny_base()
    prompt = random_tokens(6)
    request = SampleRequest(prompt, num_samples=2, max_tokens=20, seed=11)
    alone = sample(base, request)
    sampler, weights = Sampler(base), base.sampler_weights(None)
    others = [SampleRequest(random_tokens(n, n), 3, max_tokens=20, seed=n) for n in (2, 17, 40)]
    futures = [sampler.submit(r, weights) for r in [others[0], others[1], request, others[2]]]
    sampler.run_until_idle()
    together = futures[2].result(timeout=0)
    assert [s.tokens for s in together.sequences] == [s.tokens for s in alone.sequences]


def test_sample_i_uses_the_seed_plus_i():
    base = tiny_base()
    prompt = random_tokens(6)
    first = sample(base, SampleRequest(prompt, num_samples=3, max_tokens=10, seed=5))
    second = sample(base, SampleRequest(prompt, num_samples=1, max_tokens=10, seed=7))
    assert first.sequences[2].tokens == second.sequences[0].tokens
    assert first.sequences[0].tokens != first.sequences[1].tokens


def test_without_a_seed_samples_differ_from_call_to_call():
    base = tiny_base()
    request = SampleRequest(random_tokens(6), max_tokens=20, stop=[])
    assert sample(base, request).sequences[0].tokens != sample(base, request).sequences[0].tokens


def test_a_negative_seed_is_a_seed():
    request = SampleRequest(random_tokens(6), num_samples=2, max_tokens=5, seed=-1)
    base = tiny_base()
    assert sample(base, request).sequences == sample(base, request).sequences


def test_deterministic_decoding_is_bit_identical_whatever_else_runs():
    base = tiny_base()
    request = SampleRequest(random_tokens(6), num_samples=3, max_tokens=20, seed=11)
    alone = sample(base, request, deterministic=True)
    for others in ((2,), (17, 40, 9)):
        sampler, weights = Sampler(base, deterministic=True, max_rows=4), base.sampler_weights(None)
        for length in others:
            other = SampleRequest(random_tokens(length, length), 2, max_tokens=30, seed=length)
            sampler.submit(other, weights)
            sampler.step()
        future = sampler.submit(request, weights)
        sampler.run_until_idle()
        assert future.result(timeout=0).sequences == alone.sequences  # tokens and logprobs


def test_prompts_of_every_length_are_read_alike():
    """Short ones attend by plain products, long ones by torch's function; padding is left out."""
    base = tiny_base()
    prompts = [random_tokens(length, length) for length in (1, 2, 50, 96, 97, 120)]
    sampler, weights = Sampler(base), base.sampler_weights(None)
    for group in (prompts, prompts[:3], prompts[:1]):
        futures = [
            sampler.submit(SampleRequest(prompt, max_tokens=2, temperature=0.0, stop=[]), weights)
            for prompt in group
        ]
        sampler.run_until_idle()
        for prompt, future in zip(group, futures, strict=True):
            tokens = future.result(0).sequences[0].tokens
            for _ in range(2):
                first = int(full_logits(base, prompt)[-1].argmax())
                assert tokens.pop(0) == first
                prompt = np.append(prompt, first)


def test_each_row_stops_at_its_own_tokens_and_limit():
    base = tiny_base()
    stops = [[], [7], [3, 7, 11], list(range(0, VOCAB, 4))]
    sampler, weights = Sampler(base), base.sampler_weights(None)
    futures = [
        sampler.submit(
            SampleRequest(random_tokens(4), 6, max_tokens=20 + index, seed=5, stop=stop), weights
        )
        for index, stop in enumerate(stops)
    ]
    sampler.run_until_idle()
    for index, (stop, future) in enumerate(zip(stops, futures, strict=True)):
        for sequence in future.result(0).sequences:
            ends = [place for place, token in enumerate(sequence.tokens) if token in stop]
            whole = len(sequence.tokens) == 20 + index
            assert ends == ([] if sequence.stop_reason == "length" else [len(sequence.tokens) - 1])
            assert whole or sequence.stop_reason == "stop"


def stopped(text_so_far: str, **settings: object):
    """What a model that counts on in the alphabet answers, and why it stopped."""
    base = tiny_base()
    model = base.plain
    with torch.no_grad():  # the next token is the last one plus 1
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        embedding = model.model.embed_tokens.weight
        model.lm_head.weight = torch.nn.Parameter(embedding.roll(1, 0).clone())
        model.model.norm.weight.fill_(1.0)
    base.llama = agreeing_llama(model)  # the one there was holds the weights before
    prompt = np.array(base.tokenizer.encode(text_so_far))
    request = SampleRequest(prompt, temperature=0.0, **settings)
    sequence = sample(base, request).sequences[0]
    return base.tokenizer.decode(sequence.tokens), sequence.stop_reason


def test_the_alphabet_model_counts_on():
    assert stopped("xyzab", max_tokens=4) == ("cdef", "length")


def test_a_stop_token_ends_the_completion_and_is_part_of_it():
    assert stopped("ab", stop=[tiny_tokenizer().encode("e")[0]], max_tokens=9) == ("cde", "stop")


def test_a_stop_string_ends_the_completion_and_is_part_of_it():
    assert stopped("ab", stop="ef", max_tokens=9) == ("cdef", "stop")
    assert stopped("ab", stop=["xx", "fg"], max_tokens=9) == ("cdefg", "stop")


def test_a_stop_string_does_not_match_across_the_prompt():
    assert stopped("ab", stop="bc", max_tokens=3) == ("cde", "length")


def test_the_end_token_stops_when_nothing_was_said_about_stopping():
    assert stopped("|", max_tokens=9) == ("}~\n<|end|>", "stop")


def test_an_empty_stop_list_turns_the_end_token_off():
    assert stopped("|", stop=[], max_tokens=6) == ("}~\n<|end|> !", "length")


def test_without_max_tokens_the_context_is_filled():
    base = tiny_base()
    sequence = sample(base, SampleRequest(random_tokens(100), stop=[])).sequences[0]
    assert (len(sequence.tokens), sequence.stop_reason) == (28, "length")


def test_prompt_logprobs_are_the_models_at_temperature_one():
    base = tiny_base()
    prompts = [random_tokens(length, length) for length in (5, 12)]
    sampler, weights = Sampler(base), base.sampler_weights(None)
    futures = [
        sampler.submit(
            SampleRequest(
                prompt,
                max_tokens=1,
                temperature=0.3,
                prompt_logprobs=True,
                topk_prompt_logprobs=3,
                target_prompt_logprobs=np.array([[7, -1]] * (len(prompt) - 1)),
            ),
            weights,
        )
        for prompt in prompts
    ]
    sampler.run_until_idle()
    for prompt, future in zip(prompts, futures, strict=True):
        result = future.result(timeout=0)
        expected = torch.log_softmax(full_logits(base, prompt), -1)[:-1]
        own = expected[range(len(prompt) - 1), prompt[1:]]
        assert math.isnan(result.prompt_logprobs[0])
        assert result.prompt_logprobs[1:] == pytest.approx(own.numpy(), abs=1e-4)
        values, ids = expected.topk(3)
        assert result.topk_prompt[0] == []
        assert [[t for t, _ in row] for row in result.topk_prompt[1:]] == ids.tolist()
        assert [v for row in result.topk_prompt[1:] for _, v in row] == pytest.approx(
            values.flatten().tolist(), abs=1e-4
        )
        assert result.target_prompt[:, 0] == pytest.approx(expected[:, 7].numpy(), abs=1e-4)
        assert not result.target_prompt[:, 1].any()  # -1 asks for nothing


def test_the_logits_of_one_prompt_at_a_time_lie_beside_those_of_all(monkeypatch):
    """Those of all prompts were copied at once: 4 GB more for 8,192 tokens of a vocabulary of
    128,000."""
    base, lengths, events = tiny_base(), [60, 61, 62, 63], []
    copies: list[weakref.ref] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.index_select.default and len(made) in lengths:
                events.append(
                    f"copied {len(made)}, {sum(ref() is not None for ref in copies)} left"
                )
            return made

    def describe(result, request, logits, seed):
        copies.append(weakref.ref(logits))
        events.append(f"described {len(logits)}")

    monkeypatch.setattr(sampler_module, "describe_prompt", describe)
    sampler, weights = Sampler(base), base.sampler_weights(None)
    for length in lengths:
        request = SampleRequest(random_tokens(length, length), max_tokens=1, prompt_logprobs=True)
        sampler.submit(request, weights)
    with Watching():
        sampler.run_until_idle()
    assert events == [event for n in lengths for event in (f"copied {n}, 0 left", f"described {n}")]


def test_only_the_last_prompt_tokens_are_scored_when_so_asked():
    base = tiny_base()
    request = SampleRequest(
        random_tokens(6),
        max_tokens=1,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        prompt_logprobs_last_n=2,
    )
    result = sample(base, request)
    assert np.isnan(result.prompt_logprobs).tolist() == [True] * 4 + [False] * 2
    assert [len(row) for row in result.topk_prompt] == [0, 0, 0, 0, 2, 2]


def test_alternative_tokens_follow_the_model_at_each_position():
    base = tiny_base()
    prompt = random_tokens(4)
    request = SampleRequest(prompt, max_tokens=1, prompt_alt_tokens_k=2000, seed=3)
    tokens, logprobs = sample(base, request).alt_tokens
    assert tokens.shape == logprobs.shape == (3, 2000)
    expected = torch.log_softmax(full_logits(base, prompt)[:-1], -1)
    assert logprobs == pytest.approx(
        expected.gather(-1, torch.from_numpy(tokens)).numpy(), abs=1e-4
    )
    for row in range(3):
        shares = np.bincount(tokens[row], minlength=VOCAB) / 2000
        assert shares == pytest.approx(expected[row].exp().numpy(), abs=0.06)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.3}],
    ids=str,
)
def test_alternative_tokens_are_the_draws_of_as_many_single_ones_cumulated_once(
    settings, monkeypatch
):
    """The probabilities were sorted and cumulated anew for each of the k."""
    logits, k, sums = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(0)), 5, []
    request = SampleRequest(random_tokens(10), prompt_alt_tokens_k=k, **settings)
    how = Drawing.of(
        *([value] * 9 for value in (request.temperature, request.top_k, request.top_p)),
        torch.device("cpu"),
    )
    counts = prompts.ALTERNATIVES + np.arange(9 * k).reshape(k, 9)
    seeds = np.full(9, 3, dtype=np.uint64)
    expected = [how.pick(logits, how.probs(logits), uniforms(seeds, each)) for each in counts]
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor, "cumsum", lambda self, *a, **b: sums.append(b) or cumsum(self, *a, **b)
    )
    tokens, logprobs = prompts.alternatives(logits, logits.log_softmax(-1), request, seed=3)
    assert tokens.tolist() == torch.stack(expected, dim=-1).tolist()
    assert logprobs.shape == (9, k)
    assert sums.count({"dtype": torch.float64}) == 1 and len(sums) <= 2


def test_topk_of_sampled_tokens_belong_to_the_scaled_distribution():
    base = tiny_base()
    prompt = random_tokens(6)
    request = SampleRequest(prompt, max_tokens=4, temperature=0.0, topk_sample_logprobs=3)
    sequence = sample(base, request).sequences[0]
    assert [row[0] for row in sequence.topk] == list(
        zip(sequence.tokens, sequence.logprobs, strict=True)
    )
    assert all(len(row) == 3 for row in sequence.topk)


def test_topk_at_a_low_temperature_has_the_next_best_tokens_with_finite_logprobs():
    base, prompt = tiny_base(), random_tokens(6)
    request = SampleRequest(prompt, max_tokens=1, temperature=1e-3, topk_sample_logprobs=5, seed=1)
    (row,) = sample(base, request).sequences[0].topk
    logits = full_logits(base, prompt)[-1].double()
    assert [token for token, _ in row] == logits.topk(5).indices.tolist()
    expected = torch.log_softmax(logits / 1e-3, -1).topk(5).values
    assert [value for _, value in row] == pytest.approx(expected.tolist(), rel=1e-2, abs=0.1)
    assert row[-1][1] < -104  # where a float32 probability is 0


def test_a_snapshot_is_not_changed_by_later_training():
    base = tiny_base()
    adapter = trained_adapter(base)
    request = SampleRequest(random_tokens(6), num_samples=2, max_tokens=10, seed=0)
    sampler, snapshot = Sampler(base), base.sampler_weights(adapter.state())
    before = sampler.submit(request, snapshot)
    sampler.step()
    tokens = random_tokens(9)
    inputs = {"target_tokens": np.roll(tokens, -1), "weights": np.ones(9, np.float32)}
    forward_backward(base, adapter, TrainRequest([TrainDatum(tokens, inputs)], "cross_entropy"))
    optim_step(adapter, AdamParams(learning_rate=0.5))
    after = sampler.submit(request, snapshot)
    trained = sampler.submit(request, base.sampler_weights(adapter.state()))
    sampler.run_until_idle()
    assert before.result(0).sequences[0].tokens == after.result(0).sequences[0].tokens
    assert before.result(0).sequences[0].tokens != trained.result(0).sequences[0].tokens


def test_several_snapshots_and_the_base_are_decoded_side_by_side():
    base = tiny_base()
    adapters = [None, trained_adapter(base, 1), trained_adapter(base, 2), trained_adapter(base, 3)]
    request = SampleRequest(random_tokens(6), num_samples=2, max_tokens=10, seed=0)
    alone = [sample(base, request, adapter).sequences[0].tokens for adapter in adapters]
    sampler = Sampler(base)
    futures = [
        sampler.submit(request, base.sampler_weights(adapter and adapter.state()))
        for adapter in adapters
    ]
    sampler.run_until_idle()
    assert [future.result(0).sequences[0].tokens for future in futures] == alone
    assert len({tuple(tokens) for tokens in alone}) == 4


@pytest.mark.parametrize("asks", [False, True], ids=["sample", "prompt logprobs"])
def test_what_prompts_have_in_common_is_computed_once(asks, monkeypatch):
    """As a system prompt, before questions of different lengths; the answers are those of each
    alone."""
    base, computed = tiny_base(), []
    hidden = Llama.hidden

    def counted(self, weights, tokens, *rest, **named):
        computed.append(len(tokens))
        return hidden(self, weights, tokens, *rest, **named)

    monkeypatch.setattr(Llama, "hidden", counted)
    system = random_tokens(40, seed=1)
    requests = [
        SampleRequest(
            np.concatenate([system, [row], random_tokens(row, row)]),
            max_tokens=6,
            seed=row,
            stop=[],
            prompt_logprobs=asks,
        )
        for row in range(1, 6)
    ]
    alone = [sample(base, request) for request in requests]
    assert sum(n for n in computed if n > 5) == 5 * 40 + sum(1 + row for row in range(1, 6))
    computed.clear()
    sampler, weights = Sampler(base), base.sampler_weights(None)
    futures = [sampler.submit(request, weights) for request in requests]
    sampler.run_until_idle()
    assert [n for n in computed if n > 5] == [40 + sum(1 + row for row in range(1, 6))]
    for future, its_own in zip(futures, alone, strict=True):
        result = future.result(timeout=0)
        assert result.sequences[0].tokens == its_own.sequences[0].tokens
        np.testing.assert_allclose(
            result.sequences[0].logprobs, its_own.sequences[0].logprobs, atol=1e-4
        )
        if asks:
            np.testing.assert_allclose(result.prompt_logprobs, its_own.prompt_logprobs, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_folded_weights_are_kept_as_far_as_memory_is_allowed(architecture):
    """Two copies of the model stayed for the next request, however large the model."""
    base = tiny_base(architecture)
    snapshots = [base.sampler_weights(trained_adapter(base, seed).state()) for seed in range(3)]
    copy = base.sampling_forward()
    size = copy.nbytes(copy.prepare(snapshots[0].state))
    for limit, kept in ((0, 1), (2 * size - 1, 1), (2 * size, 2), (99 * size, 2)):
        sampler = Sampler(base, folded_bytes=limit)
        for snapshot in snapshots:
            sampler.submit(SampleRequest(random_tokens(3), max_tokens=2), snapshot)
            sampler.run_until_idle()
        assert list(sampler._folded) == snapshots[-kept:]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("allowed", [0, 2])
def test_requests_wait_where_their_weights_find_no_memory(allowed, deterministic):
    """Each of 30 learners' adapters that were decoded with at once had a copy of the model."""
    base = tiny_base()
    snapshots = [base.sampler_weights(trained_adapter(base, seed).state()) for seed in range(5)]
    copy = base.sampling_forward()
    size = copy.nbytes(copy.prepare(snapshots[0].state))
    request = SampleRequest(random_tokens(5), 2, max_tokens=9, seed=0, stop=[])
    sampler = Sampler(base, folded_bytes=allowed * size, deterministic=deterministic)
    futures = [sampler.submit(request, snapshot) for snapshot in snapshots]
    most = 0
    while sampler.step():
        most = max(most, len({id(batch.weights) for batch in sampler._batches.values()}))
    assert most == max(1, allowed)
    results = [future.result(0).sequences[0].tokens for future in futures]
    for seed, tokens in enumerate(results):
        assert tokens == sample(base, request, trained_adapter(base, seed)).sequences[0].tokens


def test_who_waits_for_memory_is_not_passed_by_for_ever(monkeypatch):
    monkeypatch.setattr(sampler_module, "PATIENCE", 30)
    base = tiny_base()
    sampler, weights = Sampler(base, folded_bytes=0), base.sampler_weights(None)
    request = SampleRequest(random_tokens(5), 2, max_tokens=20, stop=[])
    sampler.submit(request, weights)
    sampler.step()
    waiting = sampler.submit(request, base.sampler_weights(trained_adapter(base).state()))
    for step in range(100):
        if step % 10 == 0:  # the first weights are always in use
            sampler.submit(request, weights)
        sampler.step()
        assert step > 30 or not waiting.done()
    assert waiting.done()


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_wait_where_their_keys_and_values_find_no_memory(deterministic):
    """256 rows of long prompts were let in, however much memory they would need."""
    base = tiny_base()
    config = base.config
    a_column = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    request = SampleRequest(random_tokens(5), 4, max_tokens=11, seed=0, stop=[])
    alone = [each.tokens for each in sample(base, request).sequences]
    for rows, expected in ((9, 8 if deterministic else 9), (1, 4)):
        sampler = Sampler(base, cache_bytes=rows * 16 * a_column, deterministic=deterministic)
        weights, most = base.sampler_weights(None), 0
        futures = [sampler.submit(request, weights) for _ in range(5)]
        while sampler.step():
            most = max(most, sum(len(batch.rows) for batch in sampler._batches.values()))
        assert most == expected
        for future in futures:
            assert [each.tokens for each in future.result(0).sequences] == alone


def test_weights_that_lie_in_memory_a_second_time_count_twice():
    base = tiny_base()
    weights = base.sampling_forward().prepare(None)
    once = weights.nbytes
    for matrix in weights.matrices:
        matrix.reordered = matrix.weight
    assert weights.nbytes == 2 * once == 2 * sum(m.weight.nbytes for m in weights.matrices)


def test_more_samples_than_fit_are_drawn_in_turns():
    base = tiny_base()
    request = SampleRequest(random_tokens(6), num_samples=11, max_tokens=6, seed=0)
    small, large = sample(base, request, max_rows=4), sample(base, request)
    assert [s.tokens for s in small.sequences] == [s.tokens for s in large.sequences]


def test_who_has_ended_stays_a_while_and_gets_nothing_more():
    """Rows that end one by one leave some at a time; two of them end where the context does."""
    base, seen = tiny_base(), []

    def asked(index: int) -> SampleRequest:
        length, stops = (124, 4) if index == 0 else (2 + index, 60)
        return SampleRequest(
            random_tokens(length, index),
            2,
            max_tokens=min(40, 128 - length),
            seed=4 + 2 * index,
            stop="e" if index % 6 == 1 else list(range(index, VOCAB, stops)),
            topk_sample_logprobs=index % 2,
            on_token=lambda sample, token, _: seen.append((index, sample, token)),
        )

    sampler, weights = Sampler(base), base.sampler_weights(None)
    futures = [sampler.submit(asked(index), weights) for index in range(20)]
    lingering = []
    while sampler.step():
        lingering += [batch.ended for batch in sampler._batches.values()]
    assert max(lingering) > 1
    together = [sequence for future in futures for sequence in future.result(0).sequences]
    told = [[event[2] for event in seen if event[:2] == divmod(row, 2)] for row in range(40)]
    assert told == [sequence.tokens for sequence in together]
    alone = [sequence for index in range(20) for sequence in sample(base, asked(index)).sequences]
    for mine, its in zip(together, alone, strict=True):
        assert (mine.tokens, mine.stop_reason) == (its.tokens, its.stop_reason)
        assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-4)
        assert len(mine.topk or []) in (0, len(mine.tokens))
    assert {sequence.stop_reason for sequence in together[:2]} == {"stop", "length"}


def test_weights_that_are_no_numbers_are_refused_and_nobody_else_fails():
    base = tiny_base()
    state = dict(trained_adapter(base).state())
    name = next(iter(state))
    state[name] = torch.full_like(state[name], math.nan)
    sampler, fine = Sampler(base), base.sampler_weights(None)
    request = SampleRequest(random_tokens(6), max_tokens=9, stop=[], seed=0)
    future = sampler.submit(request, fine)
    sampler.step()
    with pytest.raises(RequestError, match="not finite: training has blown up"):
        sampler.submit(request, base.sampler_weights(state))
    sampler.run_until_idle()
    assert len(future.result(0).sequences[0].tokens) == 9


@pytest.mark.parametrize(
    "extreme",
    [{"temperature": value} for value in (1e-38, 1e-40, 1e-46)] + [{"top_p": 1e-46}],
    ids=str,
)
def test_settings_too_small_for_float32_draw_the_likeliest_token(extreme):
    base, prompt = tiny_base(), random_tokens(6)
    greedy = sample(base, SampleRequest(prompt, max_tokens=8, temperature=0.0, stop=[]))
    cold = sample(base, SampleRequest(prompt, max_tokens=8, stop=[], seed=1, **extreme))
    assert cold.sequences[0].tokens == greedy.sequences[0].tokens
    assert np.isfinite(cold.sequences[0].logprobs).all()


def test_a_top_k_beyond_every_vocabulary_restricts_nothing():
    base, prompt = tiny_base(), random_tokens(6)
    wide = sample(base, SampleRequest(prompt, max_tokens=8, stop=[], seed=1, top_k=2**63))
    free = sample(base, SampleRequest(prompt, max_tokens=8, stop=[], seed=1))
    assert wide.sequences[0].tokens == free.sequences[0].tokens


@pytest.mark.parametrize("deterministic", [False, True])
def test_one_request_leaves_room_for_another(deterministic):
    """Eight samples on eight rows take six of them, and a later call is done before they are."""
    base = tiny_base()
    sampler = Sampler(base, max_rows=8, deterministic=deterministic)
    weights = base.sampler_weights(None)
    large = SampleRequest(random_tokens(6), 8, max_tokens=60, seed=0, stop=[])
    first = sampler.submit(large, weights)
    sampler.step()
    small = SampleRequest(random_tokens(4), 1, max_tokens=3, seed=0, stop=[])
    second = sampler.submit(small, weights)
    while not second.done():
        assert sum(len(batch.rows) for batch in sampler._batches.values()) <= 8
        assert sampler.step()
    assert not first.done()
    sampler.run_until_idle()
    alone = sample(base, large, deterministic=deterministic, max_rows=8)
    assert [s.tokens for s in first.result(0).sequences] == [s.tokens for s in alone.sequences]


def test_after_a_failure_no_request_is_left_behind(monkeypatch):
    base = tiny_base()
    sampler = Sampler(base, max_rows=8, deterministic=True)  # the second finds no room
    weights = base.sampler_weights(None)
    request = SampleRequest(random_tokens(6), 8, max_tokens=60, seed=0, stop=[])
    futures = [sampler.submit(request, weights) for _ in range(3)]
    monkeypatch.setattr(Batch, "step", broken)
    with pytest.raises(MemoryError):
        sampler.step()
    sampler.reset()
    assert all(future.cancelled() for future in futures)
    monkeypatch.undo()
    fine = sampler.submit(request, weights)
    sampler.run_until_idle()
    assert len(fine.result(0).sequences) == 8


def broken(*args: object, **named: object) -> None:
    raise MemoryError("no room for logits")


@pytest.mark.parametrize("where", ["describe_prompt", "prefill", "admit"])
def test_prompts_that_cannot_be_computed_fail_alone(where, monkeypatch):
    """Whatever else was decoded with the same model failed with them."""
    base = tiny_base()
    sampler, weights = Sampler(base, max_rows=12), base.sampler_weights(None)
    others = base.sampler_weights(trained_adapter(base).state())
    request = SampleRequest(random_tokens(6), 2, max_tokens=20, seed=0, stop=[])
    going, elsewhere = (sampler.submit(request, each) for each in (weights, others))
    sampler.step()
    asking = SampleRequest(random_tokens(9), 12, max_tokens=20, stop=[], prompt_logprobs=True)
    failing = [sampler.submit(asking, weights) for _ in range(2)]  # more rows than there is room
    owners = {
        "describe_prompt": sampler_module,
        "prefill": LlamaForward,
        "admit": cache.SlabLayer,  # halfway: what was there before is lost, too
    }
    monkeypatch.setattr(owners[where], where, broken)
    sampler.step()
    sampler.step()
    monkeypatch.undo()
    sampler.run_until_idle()
    lost = [*failing, going] if where == "admit" else failing
    assert all(isinstance(future.exception(0), MemoryError) for future in lost)
    for future, adapter in ((going, None), (elsewhere, trained_adapter(base))):
        if future not in lost:
            alone = sample(base, request, adapter)
            tokens = [sequence.tokens for sequence in future.result(0).sequences]
            assert tokens == [sequence.tokens for sequence in alone.sequences]
    assert not (sampler._waiting or sampler._running or sampler._batches)
    again = sampler.submit(asking, weights)
    sampler.run_until_idle()
    assert len(again.result(0).sequences) == 12


def test_tokens_are_told_as_they_come():
    base = tiny_base()
    seen: list[tuple[int, int, float]] = []
    request = SampleRequest(
        random_tokens(6),
        num_samples=2,
        max_tokens=5,
        seed=0,
        on_token=lambda *event: seen.append(event),
    )
    result = sample(base, request)
    for index, sequence in enumerate(result.sequences):
        assert [token for sample, token, _ in seen if sample == index] == sequence.tokens


def test_a_cancelled_request_leaves_and_the_others_go_on():
    base = tiny_base()
    sampler, weights = Sampler(base), base.sampler_weights(None)
    gone: list[int] = []
    stopping = SampleRequest(
        random_tokens(6), 2, max_tokens=20, seed=0, stop=[], cancelled=lambda: bool(gone)
    )
    staying = SampleRequest(random_tokens(4), 2, max_tokens=20, seed=0, stop=[])
    first, second = sampler.submit(stopping, weights), sampler.submit(staying, weights)
    sampler.step()
    gone.append(1)
    sampler.run_until_idle()
    assert first.cancelled()
    alone = sample(base, staying)
    assert [s.tokens for s in second.result(0).sequences] == [s.tokens for s in alone.sequences]


BAD = {
    "an empty prompt": ({"prompt": np.zeros(0, np.int64)}, "prompt is empty"),
    "a token outside": ({"prompt": np.array([VOCAB])}, f"prompt holds token {VOCAB}"),
    "too much": (
        {"max_tokens": 125},
        r"Prompt length plus max_tokens exceeds the model's context window: 4 \+ 125 > 128",
    ),
    "no room": ({"prompt": random_tokens(128)}, r"128 \+ 1 > 128"),
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0"),
    "no samples": ({"num_samples": 0}, "num_samples is 0"),
    "heat": ({"temperature": -1.0}, "temperature is -1.0"),
    "no number": ({"temperature": math.nan}, "temperature is nan"),
    "top_p": ({"top_p": 0.0}, "top_p is 0.0"),
    "top_k": ({"top_k": -2}, "top_k is -2"),
    "empty stop": ({"stop": ["a", ""]}, "empty string"),
    "mixed stop": ({"stop": ["a", 3]}, "mixes strings and token ids"),
    "stop outside": ({"stop": [VOCAB]}, f"stop holds token {VOCAB}"),
    "targets": ({"target_prompt_logprobs": np.zeros((4, 2), np.int64)}, r"must be \(3, K\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_makes_no_sense_is_refused_before_it_waits(name):
    changes, words = BAD[name]
    base = tiny_base()
    sampler = Sampler(base)
    with pytest.raises(RequestError, match=words):
        sampler.submit(
            SampleRequest(**({"prompt": random_tokens(4)} | changes)), base.sampler_weights(None)
        )
    assert not sampler.step()


def test_the_end_token_of_the_miniatures_is_what_the_tests_think():
    assert tiny_tokenizer().encode("<|end|>") == [END]
