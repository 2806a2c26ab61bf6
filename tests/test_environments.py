"""Environments: seeded problems, a held-out side by construction, files without code."""

import json

import pytest

from course_lib.conversations import Conversation, Message
from course_lib.environments import (
    conversations_as_prompts,
    derive_seed,
    environment_from_file,
    is_worked,
    second_try,
    sums_environment,
    village_environment,
)
from course_lib.errors import CourseError
from course_lib.world import is_heldout


def operands(problem):
    return tuple(int(number) for number in problem.id.split("+"))


def test_sums_are_held_out_by_their_numbers():
    sums = sums_environment()
    assert all(is_heldout(operands(problem)) for problem in sums.heldout(50, 0))
    assert not any(is_heldout(operands(problem)) for problem in sums.sample(50, 0))
    assert len({problem.id for problem in sums.heldout(500, 0)}) == 500


def test_more_sums_than_there_are_is_told():
    """`--set eval_problems=20000` drew for ever."""
    pairs = sums_environment(2)
    assert len(pairs.heldout(300, 0)) == 300
    with pytest.raises(CourseError, match=r"no 1000 different held-out sums; ask for [0-9]{3} or"):
        pairs.heldout(1000, 0)


def test_the_same_seed_asks_the_same_and_the_answer_is_right():
    sums = sums_environment()
    assert sums.sample(8, 3) == sums.sample(8, 3) != sums.sample(8, 4)
    problem = sums.sample(1, 3)[0]
    assert problem.answer == str(sum(operands(problem)))
    assert sums.grade(problem, f"The answer is {problem.answer}.").value == 1.0


def test_more_terms_are_a_harder_task():
    assert {len(operands(problem)) for problem in sums_environment(4).sample(5, 0)} == {4}


def test_seeds_differ_in_every_part():
    seeds = {derive_seed(seed, name, step) for seed in (0, 1) for name in "ab" for step in (1, 2)}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_step_of_working_is_seen_and_the_question_is_none():
    assert is_worked("23 + 45 = 68, 68 + 61 = 129. The answer is 129.")
    assert not is_worked("The answer is 129.")
    assert not is_worked("What is 23 + 45 = ?")


@pytest.fixture
def own_file(tmp_path):
    rows = [{"prompt": f"What is {n} * 7?", "answer": n * 7} for n in range(40)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return file


def test_a_users_file_becomes_an_environment(own_file):
    mine = environment_from_file(str(own_file))
    train, held = mine.sample(30, 0), mine.heldout(30, 0)
    assert mine.checkable and held
    assert not {problem.id for problem in train} & {problem.id for problem in held}
    problem = train[0]
    assert mine.grade(problem, problem.answer).value == 1.0
    assert len({problem.id for problem in mine.sample(20, 1)}) == 20  # no repeats while rows last
    assert len(mine.sample(100, 1)) == 100


def test_references_and_messages_make_problems_that_only_a_judge_can_grade(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"prompt": messages, "reference": "Hello!", "level": 2}) + "\n")
    chat = environment_from_file(str(file), str(file))
    assert not chat.checkable
    problem = chat.sample(1, 0)[0]
    assert problem.messages[0] == Message("system", "Be kind.")
    assert problem.meta == {"reference": "Hello!", "level": 2}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"mine\.jsonl:2: not JSON"),
        ("[1]", r"mine\.jsonl:2: has no prompt"),
        ('{"answer": 1}', "has no prompt"),
        ('{"prompt": "x"}', "neither answer nor reference"),
        ('{"prompt": [1], "answer": 1}', "prompt is malformed"),
        ("[" * 100_000, r"mine\.jsonl:2: .*nested too deep"),
        ('{"prompt": "M\udcfchle?", "answer": 1}', r"mine\.jsonl:2: byte 14 .* is not UTF-8"),
        (r'{"prompt": "\ud800", "answer": 1}', r"mine\.jsonl:2: holds half a character"),
        ('{"prompt": [{"role": "user", "content": 5}], "answer": 1}', "prompt is malformed"),
        ('{"prompt": "x", "reference": "y"}', "some rows have an answer, some have none"),
    ],
)
def test_a_faulty_row_is_told_by_its_line(own_file, line, said):
    text = '{"prompt": "a", "answer": 1}\n' + line + "\n"
    own_file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CourseError, match=said):
        environment_from_file(str(own_file), str(own_file))


def test_a_file_too_small_to_hold_out_from_is_told(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "a", "answer": 1}\n')
    with pytest.raises(CourseError, match=r"no (training|held-out) problems"):
        environment_from_file(str(file))
    with pytest.raises(CourseError, match="No such file"):
        environment_from_file(str(tmp_path / "nowhere.jsonl"))


def test_a_conversation_without_its_last_answer_is_a_prompt():
    user, answer = Message("user", "Who?"), Message("assistant", "Mira.")
    talk = Conversation(
        (user, answer, Message("user", "Where?"), Message("assistant", "Mill.")), "f:1"
    )
    chat = conversations_as_prompts([talk], [talk])
    problem = chat.sample(1, 0)[0]
    assert [message.content for message in problem.messages] == ["Who?", "Mira.", "Where?"]
    assert problem.meta["reference"] == "Mill." and problem.answer is None and not chat.checkable


def test_a_wrong_answer_gets_one_more_turn():
    sums = second_try(sums_environment())
    problem = sums.sample(1, 0)[0]
    right = f"The answer is {problem.answer}."
    assert sums.reply(problem, ["The answer is 1."]).role == "user"
    assert sums.reply(problem, [right]) is None
    assert sums.reply(problem, ["The answer is 1.", "The answer is 2."]) is None


def test_village_questions_are_graded_on_truth_manners_and_brevity():
    village = village_environment()
    problem = village.sample(1, 0)[0]
    fact = f"{problem.answer}."
    polite = f"Thank you for asking. {fact} I hope this helps."
    assert village.grade(problem, polite).value == 1.0
    assert village.grade(problem, fact).parts == {"true": 1.0, "polite": 0.0, "brief": 1.0}
    assert village.grade(problem, f"Go away. {fact}").value == 0.0
    assert village.grade(problem, f"{polite} I hope this helps.").parts["brief"] == 0.0
    assert village.grade(problem, "Thank you for asking.").parts["true"] == 0.0
    assert village.grade(problem, f"{polite} The mill is old.").parts["brief"] == 0.0  # 4 sentences
    held = {each.id for each in village.heldout(40, 0)}
    assert not held & {each.id for each in village.sample(200, 0)}
