"""The world's claims: what is held out is seen nowhere, and the corpus never shows a chat that
answers.
"""

import json
import random
import re
import runpy
import sys
from itertools import islice, zip_longest
from pathlib import Path

import pytest

from course_lib.world import direct_answer, is_heldout, sum_problem, worked_answer
from course_lib.world.corpus import documents
from course_lib.world.sums import QUESTION_FORMS, ask
from course_lib.world.village import FACTS, VILLAGERS, fact_sentence

DATA = Path(__file__).parent.parent / "data"
SEEN = re.compile(r"\d+(?: \+ \d+| plus \d+|, \d+)* and \d+|\d+(?: \+ \d+| plus \d+)+")


def operand_groups(text: str) -> list[tuple[int, ...]]:
    """Every group of numbers that the text adds, whatever the wording."""
    return [tuple(int(n) for n in re.findall(r"\d+", found)) for found in SEEN.findall(text)]


@pytest.mark.parametrize("form", QUESTION_FORMS)
def test_every_wording_is_recognised_by_the_leak_detector(form):
    question = ask((23, 45, 61), form, random.Random(0))
    assert operand_groups(question) == [(23, 45, 61)]


def test_no_heldout_sum_of_three_occurs_in_the_corpus_in_any_wording_or_order():
    text = "\n".join(islice(documents(1), 20_000))
    groups = [group for group in operand_groups(text) if len(group) == 3]
    assert len(groups) > 10_000
    assert not [group for group in groups if is_heldout(group)]


def test_no_heldout_sum_occurs_in_the_shipped_conversations():
    text = (DATA / "conversations.jsonl").read_text()
    groups = [group for group in operand_groups(text) if len(group) == 3]
    assert len(groups) > 1_000
    assert not [group for group in groups if is_heldout(group)]


def test_heldout_conversations_ask_heldout_sums_only_and_share_no_row_with_training():
    text = (DATA / "heldout.jsonl").read_text()
    groups = [group for group in operand_groups(text) if len(group) == 3]
    assert len(groups) > 100
    assert all(is_heldout(group) for group in groups)
    train = set((DATA / "conversations.jsonl").read_text().splitlines())
    assert not train & set(text.splitlines())


def test_training_and_heldout_problems_never_meet():
    rng = random.Random(3)
    train = {tuple(sorted(sum_problem(rng).operands)) for _ in range(3_000)}
    heldout = {tuple(sorted(sum_problem(rng, heldout=True).operands)) for _ in range(1_000)}
    assert not train & heldout


def test_being_held_out_does_not_depend_on_order():
    rng = random.Random(4)
    for _ in range(500):
        operands = [rng.randint(10, 99) for _ in range(3)]
        shuffled = operands[:]
        rng.shuffle(shuffled)
        assert is_heldout(operands) == is_heldout(shuffled)


def test_worked_and_direct_answers_end_alike():
    assert worked_answer((23, 45, 61)) == "23 + 45 = 68, 68 + 61 = 129. The answer is 129."
    assert worked_answer((23, 45, 61)).endswith(direct_answer((23, 45, 61)))


def test_the_corpus_marks_turns_but_never_answers_a_question_in_them():
    text = "".join(islice(documents(2), 5_000))
    for token in ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>"):
        assert token in text
    turns = re.findall(r"<\|(?:user|assistant)\|>([^<]*)", text)
    assert len(turns) > 1_000
    assert not [turn for turn in turns if "?" in turn or re.search(r"\d", turn)]


def test_every_trade_place_animal_colour_and_food_belongs_to_one_villager():
    for fact in FACTS:
        values = [getattr(villager, fact) for villager in VILLAGERS]
        assert len(set(values)) == len(values), fact


def test_facts_are_stated_as_sentences():
    assert fact_sentence(VILLAGERS[0], "animal") == "Mira keeps a goat"


@pytest.mark.parametrize("name", ["conversations.jsonl", "heldout.jsonl", "preferences.jsonl"])
def test_every_row_that_is_shipped_is_what_the_script_makes(name, made_again):
    """Only the first fifty rows were compared, and a wrong answer in row 500 was nobody's."""
    shipped, made = ((folder / name).read_bytes().split(b"\n") for folder in (DATA, made_again))
    pairs = enumerate(zip_longest(shipped, made), start=1)
    changed = [number for number, (row, again) in pairs if row != again]
    assert not changed, (
        f"data/{name}:{changed[0]} is not what data/make_data.py makes ({len(changed)} such rows): "
        "rows are not edited by hand; change course_lib/world and run python data/make_data.py"
    )


@pytest.fixture(scope="module")
def made_again(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_data.py", "--out", str(folder)])
        runpy.run_path(str(DATA / "make_data.py"), run_name="__main__")
    return folder


def test_chosen_replies_are_true_and_civil():
    truths = {fact_sentence(villager, fact) for villager in VILLAGERS for fact in FACTS}
    rows = [json.loads(line) for line in (DATA / "preferences.jsonl").open()]
    assert len(rows) >= 400
    for row in rows:
        assert any(truth in row["chosen"] for truth in truths), row
        assert not re.search(r"Go away|Stop asking|no time", row["chosen"])
        assert row["chosen"] != row["rejected"]
