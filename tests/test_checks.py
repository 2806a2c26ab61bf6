"""Every exercise refuses every named wrong answer with its own words; the desk never raises."""

from __future__ import annotations

import inspect
import json
import random
import re
from concurrent.futures import Future

import pytest

from course_lib.checks import check, desk, hint, progress
from course_lib.checks.calling import call
from course_lib.checks.compare import close, describe
from course_lib.checks.exercise import FIRST_SEED, SECOND_SEED, Exercise
from course_lib.checks.judge import judge, parameters
from course_lib.checks.record import read_progress
from course_lib.checks.registry import LESSONS, every_exercise, exercises, find

EXERCISES = every_exercise()
MUTANTS = [(exercise, name) for exercise in EXERCISES for name in exercise.mutants]


def by_id(exercise: Exercise) -> str:
    return exercise.id


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "progress.json"))
    monkeypatch.setattr(desk, "_handed_out", {})


def answers(exercise: Exercise, function) -> list[tuple[object, dict]]:
    """What a learner would hand to `check`: the function itself, or its value for each case."""
    if exercise.answers == "function":
        return [(function, {})]
    names = parameters(exercise)
    cases = exercise.cases_from(FIRST_SEED) + exercise.cases_from(SECOND_SEED)
    return [(function(*case), dict(zip(names, case, strict=True))) for case in cases]


def stub_value(exercise: Exercise):
    scope: dict = {}
    exec(exercise.stub, scope)
    return scope[exercise.name]


def test_there_are_thirty_exercises_and_two_to_four_in_each_lesson():
    assert len(EXERCISES) >= 30
    counts = {lesson: len(exercises(lesson)) for lesson in LESSONS}
    assert [f"{lesson}: {n} exercises" for lesson, n in counts.items() if not 2 <= n <= 4] == []


def test_ids_are_numbered_within_their_lesson():
    for lesson in LESSONS:
        ids = [exercise.id for exercise in exercises(lesson)]
        assert ids == [f"{lesson}.{number}" for number in range(1, len(ids) + 1)]


def test_every_kind_of_exercise_occurs():
    kinds = {exercise.kind for exercise in EXERCISES}
    assert kinds == {"code", "predict", "find the bug", "behaviour", "artefact"}


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_the_reference_passes(exercise):
    for answer, given in answers(exercise, exercise.reference):
        verdict = judge(exercise, answer, given)
        assert verdict.status == "passed", verdict.text


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_the_stub_is_not_attempted(exercise):
    given = answers(exercise, exercise.reference)[0][1]
    assert judge(exercise, stub_value(exercise), given).status == "not attempted"


@pytest.mark.parametrize("exercise,name", MUTANTS, ids=lambda x: x if isinstance(x, str) else x.id)
def test_every_mutant_fails_with_its_own_message(exercise, name):
    mutant = exercise.mutants[name]
    for answer, given in answers(exercise, mutant.answer):
        verdict = judge(exercise, answer, given)
        assert verdict.status == "not yet"
        assert mutant.message in verdict.text
        assert sum(other.message in verdict.text for other in exercise.mutants.values()) == 1


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_there_are_three_mutants_and_three_hints_of_readable_length(exercise):
    assert len(exercise.mutants) >= 3, "name three wrong answers that learners write"
    messages = [mutant.message for mutant in exercise.mutants.values()]
    assert len(set(messages)) == len(messages), "two mutants say the same"
    assert len(set(exercise.hints)) == 3
    texts = (*exercise.hints, *messages)
    unread = [text for text in texts if not 4 <= len(text.split()) <= 45]
    assert not unread, "hints and messages have 4 to 45 words"


def solution_lines(exercise: Exercise) -> list[str]:
    """The lines of the reference that carry the solution, without spaces."""
    lines = inspect.getsource(exercise.reference).splitlines()
    code = [re.sub(r"\s+", "", line.split("#")[0]) for line in lines]
    body = [line for line in code if line and not line.startswith(("def", '"""', "@", ")", "else"))]
    lines = [line.removeprefix("return") for line in body]
    return [
        line for line in lines if len(line) >= 12 and line[0] not in "\"'{["
    ]  # not mere literals


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_no_hint_contains_a_line_of_the_solution(exercise):
    told = [re.sub(r"\s+", "", text) for text in (*exercise.hints, exercise.stub)]
    for line in solution_lines(exercise):
        assert not any(line in text for text in told), line


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if e.answers == "function"], ids=by_id)
def test_the_second_seed_asks_other_questions(exercise):
    if exercise.same is not None and not exercise.one_seed:
        first, second = exercise.cases_from(FIRST_SEED), exercise.cases_from(SECOND_SEED)
        assert not all(map(close, first, second))


PASTED = [e for e in EXERCISES if e.answers == "function" and e.same and not e.observe]


@pytest.mark.parametrize("exercise", PASTED, ids=by_id)
def test_pasting_the_numbers_of_the_first_seed_fails(exercise):
    """A table of the answers that a verdict may show; other cases get the first answer."""
    cases = exercise.cases_from(FIRST_SEED)
    table = {repr(case): exercise.reference(*case) for case in cases}
    pasted = next(iter(table.values()))
    verdict = judge(exercise, lambda *case: table.get(repr(case), pasted), {})
    assert verdict.status == "not yet"


def test_pasted_numbers_are_called_by_their_name():
    exercise = find("05.1")
    table = {repr(c): exercise.reference(*c) for c in exercise.cases_from(FIRST_SEED)}
    verdict = judge(exercise, lambda rewards: table.get(repr((rewards,)), [[0.5]]), {})
    assert "pasted" in verdict.text


# --- whatever a learner's function does, there is a sentence for it


def verdict_on(answer, id: str = "05.4") -> str:
    return judge(find(id), answer, {}).text


def test_an_error_is_told_with_the_arguments_that_cause_it():
    text = verdict_on(lambda p, group_size: 1 / p)
    assert "ZeroDivisionError" in text
    assert "p = 0" in text


def test_an_endless_loop_comes_back(monkeypatch):
    monkeypatch.setattr("course_lib.checks.calling.TIME_LIMIT_S", 0.2)

    def forever(p, group_size):
        while True:
            group_size += 1

    assert "loop without an end" in verdict_on(forever)


def test_an_endless_loop_on_one_line_comes_back():
    # It never begins another line, so a judge that watched lines alone hung for ever.
    def forever():
        while True: pass  # noqa: E701  # fmt: skip

    assert call(forever, (), limit_s=0.2).out_of_time


def test_a_function_without_a_return_is_told_so():
    def forgetful(p, group_size):
        p**group_size + (1 - p) ** group_size

    assert "`return` missing" in verdict_on(forgetful)


def test_an_answer_made_of_arrays_is_judged_by_its_properties():
    import numpy as np

    def batches(n, batch_size, seed, epoch):
        order = np.random.default_rng([seed, epoch]).permutation(n)
        return order[: n // batch_size * batch_size].reshape(-1, batch_size)

    exercise = find("03.2")
    assert exercise is not None
    assert judge(exercise, batches, {}).status == "passed"


def test_renamed_arguments_are_told_before_a_later_cell_breaks_on_them():
    assert "Keep the names" in verdict_on(lambda p, g: p**g + (1 - p) ** g)


def test_wrong_batches_that_are_whole_and_repeatable_are_refused():
    """Rows counted from 1, and rows that no epoch ever sees: both passed."""
    exercise = find("03.2")
    assert exercise is not None

    def from_one(n, batch_size, seed, epoch):
        return [
            [row + 1 for row in rows] for rows in exercise.reference(n, batch_size, seed, epoch)
        ]

    def first_rows_only(n, batch_size, seed, epoch):
        return exercise.reference(n // batch_size * batch_size, batch_size, seed, epoch)

    assert "first row is row 0" in judge(exercise, from_one, {}).text
    assert "same rows are dropped" in judge(exercise, first_rows_only, {}).text


def test_batches_that_lose_a_whole_one_or_hold_too_many_rows_are_told_so():
    """`range(0, n - batch_size, ...)` passed: no case had a whole number of batches."""
    exercise = find("03.2")
    assert exercise is not None

    def loses_the_last(n, batch_size, seed, epoch):
        order = random.Random(f"{seed}/{epoch}").sample(range(n), n)
        return [order[i : i + batch_size] for i in range(0, n - batch_size, batch_size)]

    def dealt_like_cards(n, batch_size, seed, epoch):
        order = random.Random(f"{seed}/{epoch}").sample(range(n), n)
        return [order[i :: n // batch_size] for i in range(n // batch_size)]

    assert "whole batch is missing" in judge(exercise, loses_the_last, {}).text
    assert "more than batch_size rows" in judge(exercise, dealt_like_cards, {}).text


def test_a_training_step_that_waits_or_returns_wrongly_is_told_so_in_words():
    """It showed two logs of calls, both cut off before the place where they differ."""
    import tinker

    def submit(client, data, learning_rate):
        adam = tinker.AdamParams(learning_rate=learning_rate)
        return client.forward_backward(data, "cross_entropy"), client.optim_step(adam)

    def waits_for_the_step_only(client, data, learning_rate):
        return submit(client, data, learning_rate)[1].result()

    def gives_the_loss(client, data, learning_rate):
        backward, update = submit(client, data, learning_rate)
        update.result()
        return backward.result().metrics["loss:sum"]

    exercise = find("00.2")
    assert exercise is not None
    assert "does not wait for both" in judge(exercise, submit, {}).text
    assert "does not wait for both" in judge(exercise, waits_for_the_step_only, {}).text
    assert "return the result" in judge(exercise, gives_the_loss, {}).text


def test_questions_of_the_same_words_in_another_order_are_no_leak():
    exercise = find("01.4")
    assert exercise is not None

    def bags_of_words(train, heldout):
        bags = [set(question.lower().split()) for question in train]
        return [i for i, question in enumerate(heldout) if set(question.lower().split()) in bags]

    assert "join them again" in judge(exercise, bags_of_words, {}).text


def test_an_unsorted_running_sum_is_not_called_pasted_numbers():
    exercise = find("02.3")
    assert exercise is not None

    def unsorted(singular_values, share):
        total = sum(value**2 for value in singular_values)
        for rank in range(len(singular_values)):
            if sum(value**2 for value in singular_values[:rank]) >= share * total:
                return rank

    assert "pasted" not in judge(exercise, unsorted, {}).text


def test_a_number_before_the_comma_of_a_sentence_is_an_answer():
    """The reference refused "129, because", which its own rule allows."""
    assert find("04.1").reference("The answer is 129, because I added.") == 129
    assert find("04.1").reference("The answer is 129,000.") is None


def test_a_formula_in_quotes_is_told_that_it_is_text():
    exercise = find("00.1")
    assert exercise is not None
    assert "without quotes" in judge(exercise, "ln(1024)", {"vocab_size": 1024}).text


def test_an_endless_loop_that_swallows_errors_comes_back():
    def stubborn():
        while True:
            try:
                len([])
            except Exception:
                continue

    assert call(stubborn, (), limit_s=0.2).out_of_time


def test_prints_are_counted_and_not_shown(capsys):
    def chatty(p, group_size):
        print("here")
        return p**group_size + (1 - p) ** group_size

    verdict = judge(find("05.4"), chatty, {})
    assert verdict.status == "passed"
    assert "printed" in verdict.text
    assert capsys.readouterr().out == ""


def test_a_function_that_changes_its_input_is_told_so():
    def in_place(rewards_P_G):
        for rewards_G in rewards_P_G:
            mean = sum(rewards_G) / len(rewards_G)
            for i in range(len(rewards_G)):
                rewards_G[i] -= mean
        return rewards_P_G

    assert "changes the list" in verdict_on(in_place, "05.1")


def test_handing_over_the_result_instead_of_the_function_is_told_so():
    assert "the function itself" in verdict_on([[0.5, -0.5]], "05.1")


def test_a_half_finished_stub_is_told_so():
    assert "still a `...`" in verdict_on(lambda p, group_size: p**group_size + ...)


def test_wrong_arguments_are_told_so():
    assert "TypeError" in verdict_on(lambda p: p)


def test_system_exit_does_not_stop_the_notebook():
    assert "SystemExit" in verdict_on(lambda p, group_size: exit())


def test_arrays_tensors_and_tuples_count_as_lists():
    numpy = pytest.importorskip("numpy")
    exercise = find("05.1")
    assert exercise is not None

    def array(rewards_P_G):
        return numpy.array(exercise.reference(rewards_P_G))

    def tuples(rewards_P_G):
        return tuple(tuple(row) for row in exercise.reference(rewards_P_G))

    assert judge(exercise, array, {}).status == "passed"
    assert judge(exercise, tuples, {}).status == "passed"


def test_values_that_can_be_read_only_once_are_refused_before_a_later_cell_breaks_on_them():
    """They passed, and a cell below then found a generator where it wanted a list."""

    def one_by_one(rewards_P_G):
        yield from find("05.1").reference(rewards_P_G)

    def mapped(rewards_P_G):
        return map(list, find("05.1").reference(rewards_P_G))

    assert "only once" in verdict_on(one_by_one, "05.1")
    assert "only once" in verdict_on(mapped, "05.1")


def test_an_unnamed_mistake_shows_one_case():
    text = verdict_on(lambda p, group_size: 0.123)
    assert "yours gives 0.123" in text
    assert "it should be" in text


# --- the desk


def test_a_loop_that_skips_the_first_token_is_refused():
    """It passed: the first token of every case was the prompt's, whose mask is 0."""

    def skips(target, sampled, advantages, mask):
        kept = (target[1:], sampled[1:], advantages[1:], mask[1:])
        return find("06.1").reference(*kept)

    assert judge(find("06.1"), skips, {}).status == "not yet"


def test_a_merge_for_square_weights_only_is_told_so():
    """It passed: every weight of the cases was square, and so is the one in the notebook."""

    def square(W, A, B, alpha):
        n = range(len(W))
        scale = alpha / len(A)
        product = [[sum(B[i][k] * A[k][j] for k in range(len(A))) for j in n] for i in n]
        return [[W[i][j] + scale * product[i][j] for j in n] for i in n]

    assert "square weights only" in verdict_on(square, "09.1")


@pytest.mark.parametrize(
    "line",
    ['base_model: "course/base"', "base_model: 'course/base'", "base_model: course/base  # frozen"],
)
def test_quotes_and_comments_in_the_front_matter_are_no_mistake(line):
    """They are good YAML; the verdict said that base_model was missing."""
    card = find("09.4").reference

    def quoted(*case):
        return card(*case).replace("base_model: course/base", line)

    assert judge(find("09.4"), quoted, {}).status == "passed"


def test_an_answer_of_the_wrong_kind_is_shown_and_not_called_a_broken_property():
    """A list for a number broke "at temperature 1 it is 0", which said nothing about the list."""
    text = verdict_on(lambda logits, token, temperature: [0.0] * len(logits), "07.2")
    assert "yours gives [0, 0, 0, 0]; it should be" in text


def test_check_returns_the_learners_function_when_it_passes(capsys):
    def mine(p, group_size):
        return p**group_size + (1 - p) ** group_size

    assert check("05.4", mine) is mine
    assert "05.4 How many groups are dead?: passed." in capsys.readouterr().out


def test_check_goes_on_with_the_reference_and_says_so(capsys):
    exercise = find("05.4")
    assert check("05.4", stub_value(exercise)) is exercise.reference
    assert "go on with the reference" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_what_a_check_handed_out_is_nobodys_answer(exercise, capsys):
    """The cell `x = check(id, x)` run twice once called the reference solved."""
    _, given = answers(exercise, exercise.reference)[0]
    handed_out = check(exercise.id, ..., **given)
    assert "not attempted" in capsys.readouterr().out
    assert check(exercise.id, handed_out, **given) is handed_out
    said = " ".join(capsys.readouterr().out.split())
    assert "not judged. This is the reference solution" in said
    assert exercise.id not in read_progress()


def test_a_future_is_told_that_its_result_was_not_taken(capsys):
    check("00.1", Future(), vocab_size=1024)
    assert "predicted_loss is a future" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda client, rate: client.optim_step(rate), "takes tinker.AdamParams(learning_rate="),
        (lambda client, rate: client.forward_backward([]).backward(), "the gradient already"),
    ],
)
def test_torchs_habits_are_answered_in_words(step, words, capsys):
    check("00.2", lambda client, data, learning_rate: step(client, learning_rate))
    assert words in " ".join(capsys.readouterr().out.split())


def test_an_id_without_quotes_is_told_so(capsys):
    hint(2.3)
    assert 'in quotes, with its zero: "02.3"' in capsys.readouterr().out


def test_a_value_answer_is_replaced_by_the_reference_value(capsys):
    assert check("00.1", ..., vocab_size=1024) == pytest.approx(6.931, abs=1e-3)
    assert check("00.1", 6.93, vocab_size=1024) == 6.93
    assert "not attempted" in capsys.readouterr().out


def test_missing_facts_and_unknown_ids_are_sentences(capsys):
    assert check("00.1", 7.0) == 7.0
    assert check("05.9", 1) == 1
    assert check("99.1", 1) == 1
    hint("zz")
    said = capsys.readouterr().out
    assert "needs vocab_size" in said
    assert "05.1, 05.2" in said
    assert "Lessons are 00 to 10" in said


def test_hints_come_one_at_a_time_and_are_remembered(capsys):
    for _ in range(4):
        hint("05.1")
    said = capsys.readouterr().out
    assert [f"hint {n} of 3" in said for n in (1, 2, 3)] == [True] * 3
    assert said.count("hint 3 of 3") == 2
    assert read_progress()["05.1"].hints == 3


def test_progress_counts_what_is_solved(capsys):
    check("05.4", lambda p, group_size: p**group_size + (1 - p) ** group_size)
    check("05.1", lambda rewards: rewards)
    capsys.readouterr()
    progress()
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("05"))
    assert "1 of 4" in line
    assert "05.1 tried 1x" in line
    assert f"1 of {len(EXERCISES)} solved" in said


def test_a_solved_exercise_stays_solved(capsys):
    check("05.4", find("05.4").reference)
    check("05.4", lambda p, group_size: 0.0)
    assert read_progress()["05.4"].solved


@pytest.mark.parametrize("damage", ["", "[1]", "{", '{"05.1": {"unknown": 1}}', '{"05.1": 3}'])
def test_a_damaged_progress_file_is_an_empty_one(damage, tmp_path, capsys):
    (tmp_path / "progress.json").write_text(damage)
    assert read_progress() == {}
    check("05.4", find("05.4").reference)
    assert json.loads((tmp_path / "progress.json").read_text())["05.4"]["solved"]


def test_what_is_readable_of_a_progress_file_is_kept(tmp_path, capsys):
    """One unknown key once made all of it count as empty, and the next check wiped it."""
    stored = {
        "05.4": {"solved": True, "tries": 1, "hints": 0, "when": "today"},
        "05.1": {"solved": "no", "tries": "x"},
        "future": [1],
    }
    path = tmp_path / "progress.json"
    path.write_text(json.dumps(stored))
    hint("05.2")
    progress()
    assert "05.4 solved" in (said := capsys.readouterr().out) and "05.1 open" in said
    kept = json.loads(path.read_text())
    assert {id: kept[id] for id in stored} == stored and kept["05.2"]["hints"] == 1


def test_a_progress_file_that_is_none_is_laid_aside(tmp_path, capsys):
    path = tmp_path / "progress.json"
    for damage in ('{"05.4": {"solved": true', "[" * 100_000):
        path.write_text(damage)
        hint("05.2")
        assert (tmp_path / "progress.json.damaged").read_text() == damage
        assert "05.2" in json.loads(path.read_text())


def test_a_folder_that_cannot_be_written_is_passed_over(monkeypatch, capsys):
    monkeypatch.setenv("COURSE_PROGRESS", "/proc/nowhere/progress.json")
    check("05.4", find("05.4").reference)
    assert "passed" in capsys.readouterr().out


def test_verdicts_never_show_an_address():
    assert "0x" not in describe([object(), lambda: 0])


def test_every_verdict_is_words_without_colour_codes(capsys):
    for exercise in EXERCISES:
        desk._say(desk.sentence(exercise, judge(exercise, ..., {})))
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert said.isascii()
