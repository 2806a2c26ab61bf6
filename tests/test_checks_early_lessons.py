"""Answers that learners write in lessons 00 to 04, and that the checks once judged wrongly."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import tinker
import torch

from course_lib.checks.calling import call
from course_lib.checks.judge import Verdict, judge
from course_lib.checks.registry import find


def judged(exercise: str, answer) -> Verdict:
    asked = find(exercise)
    assert asked
    return judge(asked, answer, {})


def submit(client, data, learning_rate):
    adam = tinker.AdamParams(learning_rate=learning_rate)
    return client.forward_backward(data, "cross_entropy"), client.optim_step(adam)


def test_a_future_may_be_asked_twice():
    """It was refused, with two logs cut off before the place where they differ."""

    def waits_then_returns(client, data, learning_rate):
        backward, update = submit(client, data, learning_rate)
        backward.result(), update.result()
        return backward.result()

    assert judged("00.2", waits_then_returns).status == "passed"


def test_asking_one_future_twice_is_not_waiting_for_both():
    def asks_one(client, data, learning_rate):
        backward, _ = submit(client, data, learning_rate)
        backward.result()
        return backward.result()

    assert judged("00.2", asks_one).mistake == "step not awaited"


def test_two_steps_on_one_gradient_are_not_a_lost_rate():
    def steps_twice(client, data, learning_rate):
        backward, update = submit(client, data, learning_rate)
        client.optim_step(tinker.AdamParams(learning_rate=learning_rate)).result()
        update.result()
        return backward.result()

    assert "more than once" in judged("00.2", steps_twice).text


def test_every_wrong_order_has_its_words():
    def step_awaited_first(client, data, learning_rate):
        client.optim_step(tinker.AdamParams(learning_rate=learning_rate)).result()
        return client.forward_backward(data, "cross_entropy").result()

    def waits_in_between_and_again(client, data, learning_rate):
        backward = client.forward_backward(data, "cross_entropy")
        backward.result()
        client.optim_step(tinker.AdamParams(learning_rate=learning_rate)).result()
        return backward.result()

    assert "before there is a gradient" in judged("00.2", step_awaited_first).text
    assert "submit both calls first" in judged("00.2", waits_in_between_and_again).text


def test_an_async_def_is_told_so_and_leaves_no_warning(recwarn):
    """It was told that forward_backward was not called, beside Python's warning with a path."""

    async def awaits(client, data, learning_rate):
        return await client.forward_backward_async(data, "cross_entropy")

    assert "plain `def`" in judged("00.2", awaits).text
    assert not recwarn.list


def test_a_shift_for_numbers_only_is_refused_before_a_later_cell_shifts_words():
    def of_tensors(tokens_T, weights_T):
        tokens, weights = torch.tensor(tokens_T), torch.tensor(weights_T)
        return tokens[:-1], tokens[1:], weights[1:]

    def of_arrays(tokens_T, weights_T):
        tokens, weights = np.array(tokens_T), np.array(weights_T)
        return tokens[:-1], tokens[1:], weights[1:]

    assert "'plums'" in judged("01.3", of_tensors).text
    assert judged("01.3", of_arrays).status == "passed"


def test_sums_without_their_digits_are_not_the_same_question():
    def letters(train, heldout):
        def bare(question):
            return " ".join(re.sub("[^a-z ]", "", question.lower()).split())

        seen = {bare(question) for question in train}
        return [i for i, question in enumerate(heldout) if bare(question) in seen]

    assert judged("01.4", letters).mistake == "letters only"


@pytest.mark.parametrize("exercise", ["01.2", "01.3", "01.4", "02.1", "03.2", "04.3"])
def test_an_iterator_is_told_to_be_a_list(exercise):
    """It passed, or broke a property; a cell below that read it again found nothing."""
    asked = find(exercise)
    assert asked

    def one_by_one(*case):
        yield from asked.reference(*case)

    assert "only once" in judge(asked, one_by_one, {}).text


def test_a_change_that_needs_every_rank_has_one():
    """`range(len(...))` stops one rank too early, and no case asked for the last."""

    def never_all(singular_values, share):
        energies = sorted((value**2 for value in singular_values), reverse=True)
        for rank in range(len(energies)):
            if sum(energies[:rank]) >= share * sum(energies):
                return rank
        return None

    assert "yours gives None; it should be 4" in judged("02.3", never_all).text


def test_no_batches_at_all_are_no_partial_batch():
    assert "whole batch is missing" in judged("03.2", lambda n, batch_size, seed, epoch: []).text


def test_text_where_a_dictionary_belongs_is_told_what_to_write():
    """It was told to write "the value itself, or the formula", which a label is not."""
    exercise = find("03.4")
    assert exercise
    losses = [2.0, 1.8]
    runs = {"A": losses, "B": [2.1, 1.8], "C": [5.0, 4.0]}
    verdict = judge(exercise, "fresh start", {"uninterrupted": losses, "resumed": runs})
    assert "Write a dictionary" in verdict.text


def test_infinity_from_a_large_exponential_is_explained():
    def naive(margins):
        with np.errstate(over="ignore"):
            return np.log1p(np.exp(-np.array(margins))).mean()

    assert "too large for a float" in judged("04.2", naive).text


def test_a_tournament_that_counts_on_the_diagonal_is_refused():
    """It passed, and then paid too little: in the notebook no reply beats itself."""

    def less_itself(first_wins_G_G):
        G = len(first_wins_G_G)
        as_first = [sum(row) - 1 for row in first_wins_G_G]
        as_second = [sum(not first_wins_G_G[j][i] for j in range(G) if j != i) for i in range(G)]
        return [(a + b) / (2 * G - 2) for a, b in zip(as_first, as_second, strict=True)]

    assert judged("04.3", less_itself).status == "not yet"


def test_a_slow_import_inside_an_answer_is_no_endless_loop(tmp_path, monkeypatch):
    """`import torch` in a function was cut off after five seconds, and torch was broken."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.4)\nVALUE = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def imports():
        import slow_to_import

        return slow_to_import.VALUE

    def imports_and_loops():
        import slow_to_import  # noqa: F401

        while True:
            pass

    try:
        assert call(imports, (), limit_s=0.2).value == 7
        assert call(imports_and_loops, (), limit_s=0.2).out_of_time
    finally:
        sys.modules.pop("slow_to_import", None)
