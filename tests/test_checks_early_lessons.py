"""Answers that learners write in lessons 00 to 04, and that the checks once judged wrongly."""

from __future__ import annotations

import random
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


@pytest.mark.parametrize(
    ("move", "said"),
    [
        (lambda order, epoch: order[:: -1 if epoch % 2 else 1], "Two epochs have the same order"),
        (lambda order, epoch: order[4 * epoch :] + order[: 4 * epoch], "Rows that share a batch"),
    ],
)
def test_an_order_that_only_moves_between_epochs_is_refused(move, said):
    """Both passed: no two epochs in a row were equal, and all rows came up at some time."""

    def shuffled_once(n, batch_size, seed, epoch):
        order = move(random.Random(seed).sample(range(n), n), epoch)
        return [order[i : i + batch_size] for i in range(0, n - batch_size + 1, batch_size)]

    assert said in judged("03.2", shuffled_once).text


RIGHT_BATCHES = {
    "sum": lambda n, seed, epoch: random.Random(seed + epoch).sample(range(n), n),
    "numpy": lambda n, seed, epoch: np.random.RandomState(1000 * seed + epoch).permutation(n),
    "torch": lambda n, seed, epoch: torch.randperm(
        n, generator=torch.Generator().manual_seed(1000 * seed + epoch)
    ),
}


@pytest.mark.parametrize("name", RIGHT_BATCHES)
def test_batches_that_are_right_in_another_way_pass(name):
    def batches(n, batch_size, seed, epoch):
        order = RIGHT_BATCHES[name](n, seed, epoch)
        whole = range(0, n - batch_size + 1, batch_size)
        return [sorted(map(int, order[i : i + batch_size])) for i in whole]

    assert judged("03.2", batches).status == "passed"


ENDS = r"(?!\d|[.,]\d)"


def reads(pattern: str):
    """A grader that matches a pattern right behind the last "answer is "."""

    def grader(text):
        _, mark, tail = text.rpartition("answer is ")
        found = re.match(pattern + ENDS, tail) if mark else None
        return int(found[1]) if found else None

    return grader


def in_one_line(text):
    found = re.search(rf"answer is (-?\d+){ENDS}(?!.*answer is )", text)
    return int(found[1]) if found else None


def a_float(text):
    number = reads(r"(-?\d+)")(text)
    return None if number is None else float(number)


LENIENT = {
    "any sign between": (reads(r"[^\w-]*(-?\d+)"), "must stand right after it"),
    "no more than three digits": (reads(r"(-?\d{1,3})"), "yours gives None"),
    "two digits or more": (reads(r"(-?\d\d+)"), "yours gives None"),
    "0 is nothing": (lambda text: reads(r"(-?\d+)")(text) or None, "takes 0 for False"),
    "in one line": (in_one_line, "No: the answer is"),
    "a float": (a_float, r"129, not 129\.0"),
}


@pytest.mark.parametrize("name", LENIENT)
def test_a_grader_that_reads_too_much_or_too_little_is_told_what(name):
    """All of them passed."""
    grader, said = LENIENT[name]
    verdict = judged("04.1", grader)
    assert verdict.status == "not yet"
    assert re.search(said, verdict.text), verdict.text


def by_words(text):
    _, mark, tail = text.rpartition("answer is ")
    word = tail.split()[0].rstrip(".,;:!?") if mark and tail.split() else ""
    return int(word) if re.fullmatch(r"-?\d+", word) else None


def in_one_pattern(text):
    found = re.search(rf"answer is (-?\d+){ENDS}(?!.*answer is )", text, re.DOTALL)
    return int(found[1]) if found else None


def digit_by_digit(text):
    _, mark, tail = text.rpartition("answer is ")
    end = 1 if tail.startswith("-") else 0
    while end < len(tail) and tail[end].isdigit():
        end += 1
    runs_on = tail[end : end + 1] in (".", ",") and tail[end + 1 : end + 2].isdigit()
    return None if not mark or tail[:end] in ("", "-") or runs_on else np.int64(tail[:end])


@pytest.mark.parametrize("grader", [by_words, in_one_pattern, digit_by_digit])
def test_graders_that_are_right_in_another_way_pass(grader):
    assert judged("04.1", grader).status == "passed"


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
