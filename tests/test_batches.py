"""Claims about course_lib.batches: the shift by one, a prompt's zeros, the order of an epoch."""

from __future__ import annotations

from collections import Counter

import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st

from course_lib.batches import epoch_batches, make_datum, make_rl_datum
from course_lib.errors import CourseError
from course_lib.rendering import Rendered


def values(datum: tinker.Datum, name: str) -> list[float]:
    return datum.loss_fn_inputs[name].to_numpy().tolist()


# --------------------------------------------------------------------------------------------------
# make_datum


def test_target_tokens_are_left_shifted_and_weights_go_with_their_targets() -> None:
    datum = make_datum(Rendered([10, 11, 12, 13], [0.0, 0.0, 1.0, 1.0]))
    assert datum.model_input.to_ints() == [10, 11, 12]
    assert values(datum, "target_tokens") == [11, 12, 13]
    assert values(datum, "weights") == [0.0, 1.0, 1.0]
    assert set(datum.loss_fn_inputs) == {"target_tokens", "weights"}


def test_the_datum_has_the_types_that_the_wire_wants() -> None:
    datum = make_datum(Rendered([10, 11, 12], [0.0, 0.0, 1.0]))
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"
    assert datum.loss_fn_inputs["weights"].dtype == "float32"


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 1.0])), min_size=2))
def test_every_trained_token_but_the_first_is_a_target_once(pairs) -> None:
    tokens, weights = (list(column) for column in zip(*pairs, strict=True))
    if not any(weights[1:]):
        return
    datum = make_datum(Rendered(tokens, weights))
    kept = zip(values(datum, "target_tokens"), values(datum, "weights"), strict=True)
    assert [t for t, w in kept if w] == [t for t, w in pairs[1:] if w]
    assert [tokens[0], *values(datum, "target_tokens")] == tokens


def test_a_conversation_over_max_length_is_refused_with_its_line_and_never_cut() -> None:
    rendered = Rendered([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0], "rows.jsonl:7")
    assert make_datum(rendered, max_length=4).model_input.length == 3
    sentence = (
        "rows.jsonl:7: the conversation has 4 tokens, max_length is 3; shorten it, "
        "or raise max_length"
    )
    with pytest.raises(CourseError) as error:
        make_datum(rendered, max_length=3)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("tokens", "weights"), [([], []), ([1], [1.0]), ([1, 2], [0.0, 0.0]), ([1, 2], [1.0, 0.0])]
)
def test_a_datum_that_would_train_nothing_is_refused(tokens, weights) -> None:
    with pytest.raises(CourseError, match="no token of it is trained on"):
        make_datum(Rendered(tokens, weights))


# --------------------------------------------------------------------------------------------------
# make_rl_datum


def test_logprobs_and_advantages_stand_beside_the_completion_targets() -> None:
    """Prompt 10 11 12, completion 20 21: the first completion token is the target of token 12."""
    datum = make_rl_datum([10, 11, 12], [20, 21], [-0.5, -0.25], [2.0, 2.0])
    assert datum.model_input.to_ints() == [10, 11, 12, 20]
    assert values(datum, "target_tokens") == [11, 12, 20, 21]
    assert values(datum, "logprobs") == [0.0, 0.0, -0.5, -0.25]
    assert values(datum, "advantages") == [0.0, 0.0, 2.0, 2.0]
    assert set(datum.loss_fn_inputs) == {"target_tokens", "logprobs", "advantages"}


def test_a_prompt_of_one_token_has_no_targets_of_its_own() -> None:
    datum = make_rl_datum([10], [20], [-1.0], [1.0])
    assert datum.model_input.to_ints() == [10]
    assert values(datum, "target_tokens") == [20]
    assert values(datum, "logprobs") == [-1.0]


def test_supervised_and_reinforcement_datums_agree_on_the_shift() -> None:
    prompt, completion = [5, 6, 7], [8, 9]
    rl = make_rl_datum(prompt, completion, [-1.0, -1.0], [1.0, 1.0])
    sl = make_datum(Rendered(prompt + completion, [0.0] * 3 + [1.0] * 2))
    assert rl.model_input.to_ints() == sl.model_input.to_ints()
    assert values(rl, "target_tokens") == values(sl, "target_tokens")
    assert values(rl, "advantages") == values(sl, "weights")


@pytest.mark.parametrize(
    "arguments",
    [
        ([], [1], [0.0], [0.0]),
        ([1], [], [], []),
        ([1], [1, 2], [0.0], [0.0, 0.0]),
        ([1], [1, 2], [0.0, 0.0], [0.0]),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments) -> None:
    with pytest.raises(CourseError, match="make_rl_datum"):
        make_rl_datum(*arguments)


# --------------------------------------------------------------------------------------------------
# epoch_batches


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_no_row_comes_twice_and_only_a_partial_batch_is_missing(n, size, seed, epoch) -> None:
    batches = epoch_batches(n, size, seed, epoch)
    rows = Counter(row for batch in batches for row in batch)
    assert set(rows.values()) == {1} and set(rows) <= set(range(n))
    assert {len(batch) for batch in batches} == {min(size, n)}
    assert n - len(rows) < size
    assert batches == epoch_batches(n, size, seed, epoch)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [str(epoch_batches(50, 10, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_the_order_is_the_same_on_every_machine_and_python() -> None:
    """Pinned: a run that was resumed elsewhere must see the rows that it would have seen."""
    assert epoch_batches(8, 3, seed=0, epoch=0) == [[0, 2, 1], [4, 6, 7]]


def test_the_rows_dropped_differ_from_epoch_to_epoch() -> None:
    dropped = [
        frozenset(range(10)) - {row for batch in epoch_batches(10, 4, 0, epoch) for row in batch}
        for epoch in range(20)
    ]
    assert all(len(rows) == 2 for rows in dropped) and len(set(dropped)) > 5


def test_a_small_file_is_one_batch_rather_than_none() -> None:
    [batch] = epoch_batches(5, 32, seed=0, epoch=0)
    assert sorted(batch) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (4, 0), (-1, 4)])
def test_no_rows_or_no_batch_is_refused(n: int, batch_size: int) -> None:
    with pytest.raises(CourseError, match="epoch_batches"):
        epoch_batches(n, batch_size, 0, 0)
