"""The fast way for plain Llamas: the numbers of the general way, each shared token only once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, random_tokens, tiny_model, tiny_tokenizer

from course_lib.engine import attention, packing, scoring
from course_lib.engine.llama import Llama
from course_lib.engine.model import BaseModel
from course_lib.engine.packing import pack, shared_prefixes
from course_lib.engine.requests import LoraSpec, TrainDatum, TrainRequest
from course_lib.engine.scoring import cut_packed, cut_padded
from course_lib.engine.trainer import forward_backward

CPU = torch.device("cpu")
PROMPT = random_tokens(20, seed=1)
OTHER = random_tokens(15, seed=2)


def rows_of(prompt: np.ndarray, *lengths: int) -> list[np.ndarray]:
    """Completions of one prompt, prompt included; every second token differs between them."""
    return [
        np.concatenate([prompt, (random_tokens(length, length) + index) % VOCAB])
        for index, length in enumerate(lengths)
    ]


GROUPS = rows_of(PROMPT, 7, 3, 12, 1) + rows_of(OTHER, 5, 9)


def test_samples_of_one_prompt_share_it():
    found = {length: sorted(members) for length, members in shared_prefixes(GROUPS)}
    assert found == {20: [0, 1, 2, 3], 15: [4, 5]}


def test_a_beginning_that_saves_little_is_not_shared():
    rows = [np.concatenate([[5], random_tokens(30, seed)]) for seed in range(3)]
    assert [length for length, _ in shared_prefixes(rows)] == [0]


def test_equal_rows_keep_a_token_of_their_own():
    assert shared_prefixes([PROMPT, PROMPT, PROMPT]) == [(19, [0, 1, 2])]


def test_two_alike_samples_do_not_split_their_group():
    rows = rows_of(PROMPT, 8, 9, 10)
    rows.append(np.concatenate([rows[0][:25], [3, 4, 5]]))  # shares 25 tokens with one, 20 with all
    assert [(length, len(members)) for length, members in shared_prefixes(rows)] == [(20, 4)]


def test_questions_of_one_wording_share_it_beside_others_of_another():
    """They all begin with the same token; that is no reason to share only that."""
    wordings = [np.concatenate([[1], random_tokens(length, length)]) for length in (5, 7, 9)]
    rows = [
        np.concatenate([wording, [40 + row], random_tokens(4, row)])
        for wording in wordings
        for row in range(4)
    ]
    alone = np.concatenate([[1], random_tokens(11, 11)])
    found = {length: sorted(members) for length, members in shared_prefixes([*rows, alone])}
    assert found == {6: [0, 1, 2, 3], 8: [4, 5, 6, 7], 10: [8, 9, 10, 11], 0: [12]}


def test_a_long_row_pads_no_short_ones():
    """The rows lay one below the other: 16,383 short ones beside one of 8,192 took 1.4 GB."""
    short = [np.array([1, token % 7, token]) for token in range(4000)]
    rows = sorted([random_tokens(8192), *short], key=lambda row: row.tobytes())
    tracemalloc.start()
    found = packing.common_beginnings(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [common([*pair]) for pair in pairwise(rows)]
    assert peak < 100 * sum(map(len, rows))


def test_beginnings_of_neighbours_are_counted_and_a_token_is_left():
    rows = [np.array(row) for row in ([1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9], [2])]
    assert packing.common_beginnings(rows) == [0, 1, 3, 2, 0]
    assert packing.common_beginnings(rows[:1]) == [] and packing.common_beginnings(rows[:2]) == [0]


def test_no_grouping_saves_much_more(monkeypatch):
    """Beside the best of all groupings, of few short rows of two different tokens."""
    monkeypatch.setattr(packing, "WORTH", 0)
    rng, shares = np.random.default_rng(0), []
    for _ in range(400):
        rows = [rng.integers(0, 2, rng.integers(1, 10)) for _ in range(rng.integers(2, 7))]
        groups = shared_prefixes(rows)
        assert sorted(row for _, members in groups for row in members) == [*range(len(rows))]
        for length, members in groups:
            assert length <= common([rows[row] for row in members])
        mine = sum(length * (len(members) - 1) for length, members in groups)
        best = max(
            sum(common([rows[row] for row in part]) * (len(part) - 1) for part in parts)
            for parts in set_partitions(list(range(len(rows))))
        )
        shares.append(mine / best if best else 1.0)
    assert min(shares) >= 0.75 and np.mean(np.array(shares) == 1) >= 0.95


def common(rows: list[np.ndarray]) -> int:
    """How many tokens all rows share at the start, one at least left to each."""
    most = min(map(len, rows)) - 1
    return next((n for n in range(most) if len({int(row[n]) for row in rows}) > 1), most)


def set_partitions(things: list[int]) -> Iterator[list[list[int]]]:
    if len(things) < 2:
        yield [things]
        return
    for parts in set_partitions(things[1:]):
        yield [things[:1], *parts]
        for index, part in enumerate(parts):
            yield [*parts[:index], [things[0], *part], *parts[index + 1 :]]


def test_a_shared_prompt_is_packed_once():
    layout = pack(GROUPS, CPU)
    assert len(layout.tokens) == 20 + 7 + 3 + 12 + 1 + 15 + 5 + 9
    rows = layout.tokens[layout.source]
    assert torch.equal(rows, torch.from_numpy(np.concatenate(GROUPS)))
    positions = np.concatenate([np.arange(len(row)) for row in GROUPS])
    assert torch.equal(layout.positions[layout.source], torch.from_numpy(positions))


def test_a_group_asks_its_prompt_together():
    rows = [np.concatenate([prompt, [index]]) for prompt in (PROMPT, OTHER) for index in range(4)]
    layout = pack(rows, CPU)
    prompts, samples = layout.buckets
    assert prompts.queries.shape == (2, 1, 20) and prompts.lent.shape == (2, 0)
    assert samples.queries.shape == (2, 4, 1) and samples.borrowed.sum(axis=1).tolist() == [15, 20]
    tokens = layout.tokens.numpy()
    assert [tokens[lent].tolist() for lent in samples.lent] == [
        [*OTHER, *tokens[[0] * 5]],
        PROMPT.tolist(),
    ]
    assert tokens[samples.queries].ravel().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("lengths", [[9] * 6, [1, 1, 1, 30, 30, 30]])
def test_rows_of_a_group_are_cut_apart_only_where_their_lengths_differ_much(lengths, monkeypatch):
    monkeypatch.setattr(packing, "A_BUCKET", 100)
    continuing = [b for b in pack(rows_of(PROMPT, *lengths), CPU).buckets if b.lent.size]
    assert [bucket.queries.shape[2] for bucket in continuing] == sorted(set(lengths))


@pytest.mark.parametrize("longest", [100, 1000, 8000])
def test_long_rows_pad_no_short_ones(longest):
    """A row of 8,192 tokens stood beside a third of 1,000 rows of 12: 2.7 million places."""
    alone = [random_tokens(length, length) for length in (longest, *range(5, 105))]
    for rows in (alone, rows_of(PROMPT, longest, *range(1, 101))):
        layout = pack(rows, CPU)
        places = sum(bucket.queries.size for bucket in layout.buckets)
        assert sum(bucket.real.sum() for bucket in layout.buckets) == len(layout.tokens)
        assert places < 2 * len(layout.tokens)


def test_a_large_group_pads_no_small_ones():
    """1,000 samples of one prompt beside 200 pairs: the pairs were padded to 1,000 each."""
    large = rows_of(PROMPT, *[4] * 40)
    pairs = [each for n in range(60) for each in rows_of(random_tokens(19, 100 + n), 4, 4)]
    buckets = [bucket for bucket in pack(large + pairs, CPU).buckets if bucket.lent.size]
    assert sum(bucket.real[..., 0].sum() for bucket in buckets) == 160
    assert sum(bucket.real[..., 0].size for bucket in buckets) < 2 * 160


def test_groups_of_almost_one_size_are_not_cut():
    rows = [
        each for n in range(8) for each in rows_of(random_tokens(19, n), *[4] * (8 - n % 2 * 4))
    ]
    (bucket,) = [bucket for bucket in pack(rows, CPU).buckets if bucket.lent.size]
    assert bucket.queries.shape == (8, 8, 4)


def datum(row: np.ndarray, columns: int | None = None, weighted: slice | None = None) -> TrainDatum:
    """A row whose last two thirds have a loss, or the `weighted` part of it."""
    generator = np.random.default_rng(len(row))
    shape = (len(row) - 1,) if columns is None else (len(row) - 1, columns)
    targets = row[1:] if columns is None else generator.integers(0, VOCAB, shape)
    weights = generator.normal(size=shape).astype(np.float32)
    counted = np.zeros(len(weights), dtype=bool)
    counted[slice(len(row) // 3, None) if weighted is None else weighted] = True
    weights[~counted] = 0
    return TrainDatum(row[:-1], {"target_tokens": targets, "weights": weights})


CASES = {
    "samples of two prompts": [datum(row) for row in GROUPS],
    "nothing in common": [datum(random_tokens(length, length)) for length in (9, 4, 30, 2)],
    "the same row twice": [datum(PROMPT), datum(PROMPT), datum(OTHER)],
    "a row that begins another": [datum(PROMPT), datum(PROMPT[:12]), datum(PROMPT[:11])],
    "one token": [datum(PROMPT[:2])],
    "a loss at every token": [datum(row, weighted=slice(None)) for row in GROUPS],
    "a loss at one token": [datum(row, weighted=slice(-1, None)) for row in GROUPS],
    "no loss anywhere": [datum(row, weighted=slice(0)) for row in GROUPS],
    "a large group beside small ones": [
        datum(row)
        for row in (
            *rows_of(PROMPT, *range(2, 13)),
            *(row for seed in range(20, 26) for row in rows_of(random_tokens(14, seed), 3, 4)),
        )
    ],
    "many lengths": [
        datum(row)
        for row in (
            *(random_tokens(length, length) for length in (120, 70, 33, 17, 9, 5, 3, 2)),
            *rows_of(PROMPT, 1, 2, 4, 9, 40, 70),
        )
    ],
    "several targets": [datum(row, columns=3) for row in GROUPS],
}


@pytest.mark.parametrize("short", [0, 24, 96], ids=lambda keys: f"short up to {keys}")
@pytest.mark.parametrize("heads", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}])
@pytest.mark.parametrize("case", CASES)
def test_the_fast_way_gives_the_numbers_of_the_general_way(case, heads, short, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", short)
    request = TrainRequest(CASES[case], "cross_entropy")
    results, gradients = [], []
    for general in (False, True):
        base = BaseModel("tiny", tiny_model("llama", **heads), tiny_tokenizer())
        assert base.llama is not None
        if general:
            base.llama = None
        adapter = base.new_adapter(LoraSpec(rank=4, seed=0))
        generator = torch.Generator().manual_seed(0)
        state = adapter.state()
        adapter.load_state(
            {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
        )
        results.append(forward_backward(base, adapter, request))
        sizes = [parameter.numel() for parameter in adapter.parameters.values()]
        gradients.append(adapter.gradients.split(sizes))
    for fast, slow in zip(*(result.loss_fn_outputs for result in results), strict=True):
        assert fast["logprobs"] == pytest.approx(slow["logprobs"], abs=1e-4, rel=3e-5)
    largest = max(float(slow.abs().max()) for slow in gradients[1])
    for fast, slow in zip(*gradients, strict=True):
        # Of a single token the gradients of queries and keys are 0, but for rounding.
        least = max(1e-3 * float(slow.abs().max()), 1e-6 * largest)
        assert torch.allclose(fast, slow, rtol=1e-3, atol=least)


def test_memory_is_bounded_and_groups_stay_together_within_it():
    assert cut_packed(GROUPS, limit=1000) == [[0, 1, 2, 3, 4, 5]]
    batches = cut_packed(GROUPS, limit=45)
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    for batch in batches:
        assert len(pack([GROUPS[row] for row in batch], CPU).tokens) <= 45


def test_a_row_beyond_the_limit_goes_alone():
    assert cut_packed([PROMPT, OTHER], limit=1) in ([[0], [1]], [[1], [0]])
    assert cut_padded([5, 9, 5], limit=10) == [[1], [0, 2]]


def test_many_micro_batches_give_the_gradient_of_one(monkeypatch):
    base = BaseModel("tiny", tiny_model(), tiny_tokenizer())
    request = TrainRequest(CASES["samples of two prompts"], "cross_entropy")
    adapters = [base.new_adapter(LoraSpec(rank=4, seed=0)) for _ in range(2)]
    for adapter, tokens in zip(adapters, (1000, 30), strict=True):
        monkeypatch.setattr(scoring, "ACTIVATION_BYTES", tokens * scoring.bytes_per_token(base))
        forward_backward(base, adapter, request)
    one, many = (adapter.gradients for adapter in adapters)
    assert torch.allclose(one, many, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen3", {}),
        ("mistral", {}),  # the miniature has a sliding window
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_what_is_no_plain_llama_goes_the_general_way(architecture, changes):
    assert BaseModel("tiny", tiny_model(architecture, **changes), tiny_tokenizer()).llama is None


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", {"tie_word_embeddings": False, "hidden_size": 40, "head_dim": 8}),
    ],
)
def test_relatives_of_the_plain_llama_take_the_fast_way(architecture, changes):
    base = BaseModel("tiny", tiny_model(architecture, **changes), tiny_tokenizer())
    assert base.llama is not None


def test_a_fast_way_that_disagrees_is_not_taken(monkeypatch):
    monkeypatch.setattr(Llama, "rotated", lambda self, qkv, rotations: qkv)
    assert BaseModel("tiny", tiny_model(), tiny_tokenizer()).llama is None
