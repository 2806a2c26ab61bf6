"""Answers that learners wrote in lessons 05 to 10, and that the checks once judged wrongly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from course_lib.checks.compare import describe
from course_lib.checks.judge import Verdict, judge
from course_lib.checks.lesson_09 import model_card
from course_lib.checks.registry import find


def judged(exercise: str, answer) -> Verdict:
    asked = find(exercise)
    assert asked
    return judge(asked, answer, {})


def test_advantages_in_one_flat_list_are_told_about_their_shape_and_not_that_they_miss_zero():
    def flat(rewards_P_G):
        return [r - sum(row) / len(row) for row in rewards_P_G for r in row]

    assert judged("05.1", flat).mistake == "flat"


def test_a_mean_along_the_wrong_axis_is_named():
    def by_column(rewards_P_G):
        return np.array(rewards_P_G) - np.mean(rewards_P_G, axis=0)

    assert judged("05.1", by_column).mistake == "mean of a column"


def difference(left, right):
    return np.abs(np.subtract(left, right))


def test_a_merge_test_that_adds_differences_up_no_longer_passes():
    """It passed, and then refused the lesson's good merge: 1024 roundings exceed one tolerance."""

    def added_up(base, adapted, merged, tolerance):
        agree = difference(merged, adapted).sum() <= tolerance
        return agree and difference(adapted, base).max() > tolerance

    assert judged("09.2", added_up).mistake == "added up"


def test_a_merge_test_that_measures_the_merged_model_against_the_base_passes_as_well():
    def other_way(base, adapted, merged, tolerance):
        agree = difference(merged, adapted).max() <= tolerance
        return agree and difference(merged, base).max() > tolerance

    assert judged("09.2", other_way).status == "passed"


def test_a_door_that_lets_any_scheme_or_only_two_spellings_in_no_longer_passes():
    def any_scheme(headers, key):
        names = {name.lower(): value for name, value in headers.items()}
        return bool(key) and names.get("authorization", "").split(" ")[1:] == [key]

    def two_spellings(headers, key):
        value = headers.get("Authorization") or headers.get("authorization")
        return bool(key) and value == f"Bearer {key}"

    assert judged("09.3", any_scheme).mistake == "any scheme"
    assert judged("09.3", two_spellings).mistake == "two spellings"


def test_a_card_indented_like_the_functions_body_has_no_front_matter():
    """Its closing dashes stand four spaces in, where no hub finds them."""

    def indented(*case):
        return model_card(*case).replace("\n", "\n    ")

    verdict = judged("09.4", indented)
    assert verdict.status == "not yet" and "has spaces before its dashes" in verdict.text


@pytest.mark.parametrize("unit", [" per cent", " percent", "**%", " %"])
def test_an_accuracy_may_be_written_out(unit):
    def card(name, base_model, licence, accuracy, problems):
        text = model_card(name, base_model, licence, accuracy, problems)
        return text.replace("% of", f"{unit} of")

    assert judged("09.4", card).status == "passed"


def test_a_token_more_or_less_for_each_answer_is_seen():
    """It passed: centred advantages add up to zero, with which any constant vanishes."""

    def one_less(advantages_G, lengths_G):
        return -sum(a * (n - 1) for a, n in zip(advantages_G, lengths_G, strict=True))

    assert judged("05.2", one_less).status == "not yet"


def test_a_merge_test_that_ships_everything_is_not_called_a_test_of_the_likeliest_token():
    verdict = judged("09.2", lambda base, adapted, merged, tolerance: True)
    assert verdict.status == "not yet" and verdict.mistake is None


@pytest.mark.parametrize("written_in", [{"base_model": "course/base"}, {"licence": "mit"}])
def test_a_card_with_the_base_or_the_licence_written_in_no_longer_passes(written_in):
    def card(name, base_model, licence, accuracy, problems):
        given = {"base_model": base_model, "licence": licence} | written_in
        return model_card(name, accuracy=accuracy, problems=problems, **given)

    assert "not the one that was given" in judged("09.4", card).text


def test_a_rounded_percentage_is_no_mistake():
    def rounded(base, tuned):
        before, after = (round(100 * sum(each) / len(each), 1) for each in (base, tuned))
        gain, problems = round(after - before, 1), len(base)
        return {"base": before, "tuned": after, "gain_points": gain, "problems": problems}

    assert judged("10.3", rounded).status == "passed"


def rows(*messages: list[tuple[str, str]]) -> str:
    said = [[{"role": role, "content": content} for role, content in each] for each in messages]
    return "\n".join(json.dumps({"messages": each}, ensure_ascii=False) for each in said)


ASKED = [[("user", question), ("assistant", f"To {question}")] for question in ("a", "b", "c")]


@pytest.mark.parametrize(
    "row",
    [
        [("user", "d"), ("system", "s"), ("assistant", "e")],
        [("assistant", "e")],
        [("user", "d\ud800"), ("assistant", "e")],
    ],
)
def test_rows_that_the_next_cell_could_not_load_no_longer_pass(row):
    assert "not sound" in judged("10.2", rows(*ASKED, row)).text


def test_a_row_of_the_same_words_in_another_order_of_keys_is_the_same_row():
    again = json.dumps(json.loads(rows(ASKED[0])), sort_keys=True)
    assert "occurs twice" in judged("10.2", f"{rows(*ASKED)}\n{again}").text


def test_a_line_break_of_typesetters_inside_a_message_ends_no_row():
    row = [("user", "d\u2028d"), ("assistant", "e")]
    assert judged("10.2", rows(*ASKED, row)).status == "passed"


def test_a_negative_zero_is_shown_as_zero():
    assert describe([-0.0, 0.0, -0.04]) == "[0, 0, -0.04]"
