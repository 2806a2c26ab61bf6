"""Rewards: the right answer and nothing else is right; a learner's own mistakes are told by file
and line.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.conversations import Message
from course_lib.errors import CourseError
from course_lib.rewards import (
    BatchReward,
    Problem,
    Score,
    correct,
    reward_from_name,
    score_completions,
    stated_answer,
)

ASKED = Problem((Message("user", "What is 23 + 45 + 61?"),), "129", "sum", "23+45+61")
THOUSANDS = Problem((Message("user", "What is 1000 + 24?"),), "1024")
NEGATIVE = Problem((Message("user", "What is 3 - 10?"),), "-7")
CAPITAL = Problem((Message("user", "Which town?"),), "Paris")

RIGHT = [
    (ASKED, "The answer is 129."),
    (ASKED, "23 + 45 = 68, 68 + 61 = 129. The answer is 129."),
    (ASKED, "the ANSWER is:   129"),
    (ASKED, "The answer is **129**."),
    (ASKED, "The answer is $129$."),
    (ASKED, "The answer is 129 apples."),
    (ASKED, "The answer is 128. No, wait: the answer is 129."),
    (ASKED, "The answer is 129.0"),
    (ASKED, "129"),
    (ASKED, " 129.\n"),
    (THOUSANDS, "The answer is 1,024."),
    (NEGATIVE, "The answer is -7."),
    (NEGATIVE, "The answer is \u22127."),
    (CAPITAL, "Paris."),
    (CAPITAL, "The answer is  paris"),
]
WRONG = [
    (ASKED, ""),
    (ASKED, "   \n"),
    (ASKED, "I think of 129."),  # a number in the prose
    (ASKED, "What is 23 + 45 + 61?"),  # the copied question
    (ASKED, "The answer is 23 + 45 + 61."),
    (ASKED, "The answer is 128 or 129."),  # two answers
    (ASKED, "The answer is 129 or 130."),
    (ASKED, "The answer is 129. The answer is 130."),
    (ASKED, "The answer is 129, 130, 131."),
    (ASKED, "The answer is"),  # unfinished
    (ASKED, "The answer is 12"),
    (ASKED, "23 + 45 = 68, 68 + 61 = 129."),
    (ASKED, "The answer is not 129."),
    (ASKED, "The answer isn't 129."),
    (ASKED, "The answer is -129."),
    (ASKED, "The answer is nan."),
    (ASKED, "The answer is inf."),
    (ASKED, "The answer is 129e1"),
    (ASKED, "The answer is 129k."),
    (ASKED, "The answer is 129%"),
    (ASKED, "The answer is 129/2"),
    (ASKED, "The answer is 129²"),
    (ASKED, "The answer is 12,9."),
    (ASKED, "The answer is 129.5."),
    (ASKED, "The answer is 0x81."),
    (ASKED, "The answer is １２９."),  # noqa: RUF001 - full-width digits are the point
    (ASKED, "The answer is 129 or ١٣٠."),  # hedging in another script
    (ASKED, "The answer is " + "9" * 10_000 + "."),
    (ASKED, "The answer is 129" + "0" * 10_000),
    (ASKED, "The answer is 129." + "0" * 10_000),  # right, but longer than any answer
    (ASKED, "answer129is"),
    (THOUSANDS, "The answer is 1,02,4."),
    (THOUSANDS, "The answer is 10,24."),
    (NEGATIVE, "The answer is 7."),
    (CAPITAL, "Paris or London"),
    (CAPITAL, ""),
]


@pytest.mark.parametrize(("problem", "completion"), RIGHT)
def test_a_right_answer_scores_one(problem, completion):
    score = correct(problem, completion)
    assert (score.value, score.parts) == (1.0, {"correct": 1.0}), score.reason


@pytest.mark.parametrize(("problem", "completion"), WRONG)
def test_an_adversarial_completion_scores_zero_and_says_why(problem, completion):
    score = correct(problem, completion)
    assert score.value == 0.0
    assert score.reason and len(score.reason) < 120


@given(st.text(max_size=200))
def test_no_text_breaks_the_grader(text):
    assert correct(ASKED, text).value in (0.0, 1.0)
    assert correct(ASKED, "The answer is " + text).value in (0.0, 1.0)


def test_reasons_tell_the_cases_apart():
    assert stated_answer("")[1] == "empty completion"
    assert stated_answer("so 129")[1] == "states no answer"
    assert stated_answer("The answer is 129 or 130")[1] == "more numbers follow the answer"
    assert correct(ASKED, "The answer is 130.").reason == "130 is wrong, wanted 129"


def test_a_problem_without_an_answer_cannot_be_checked():
    with pytest.raises(CourseError, match="has no answer"):
        correct(Problem((Message("user", "Tell me a story."),)), "Once upon a time")


def test_format_rewards_one_closing_sentence_right_or_wrong():
    reward = reward_from_name("format")
    assert reward(ASKED, "The answer is 130.").value == 1.0
    for decimal in ("The answer is 3.5.", "So. The answer is -1,024.25."):
        assert reward(ASKED, decimal).value == 1.0, decimal
    for bad in ("The answer is 3.5", "The answer is 3. 5.", "The answer is 3.5.1."):
        assert reward(ASKED, bad).value == 0.0, bad
    for bad in ("The answer is 129", "129", "The answer is 1. The answer is 2.", "The answer is ."):
        assert reward(ASKED, bad).value == 0.0, bad


def test_length_and_polite_are_naive_on_purpose():
    assert reward_from_name("length")(ASKED, "word " * 20).value == 0.5
    assert reward_from_name("length")(ASKED, "word " * 400).value == 1.0
    assert reward_from_name("polite")(ASKED, "Thank you! Thank you! Please, thanks.").value == 1.0
    assert reward_from_name("polite")(ASKED, "The answer is 129.").value == 0.0


def test_a_weighted_sum_keeps_its_parts_visible():
    score = reward_from_name("correct + 0.2*format + -0.5*length")(ASKED, "The answer is 129.")
    assert score.value == pytest.approx(1 + 0.2 - 0.5 * 4 / 40)
    assert score.parts == {"correct": 1.0, "format": 1.0, "length": 0.1}
    assert score.reason.count(";") == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("corect", "did you mean correct"),
        ("correct+", "is unknown"),
        ("x*correct", "is no weight"),
        ("nan*correct", "is no weight"),
        ("inf*correct", "is no weight"),
        ("nowhere.py:mine", "no such file"),
    ],
)
def test_an_unknown_reward_is_told_in_one_line(spec, said):
    with pytest.raises(CourseError, match=said):
        reward_from_name(spec)


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from course_lib.rewards import Score\n"
        "def shout(problem, completion):\n"
        "    return completion.isupper()\n"
        "def scored(problem, completion):\n"
        "    return Score(0.25, {'a': 1}, 'because')\n"
        "def broken(problem, completion):\n"
        "    return {}['missing']\n"
        "def none(problem, completion):\n"
        "    pass\n"
        "def nan(problem, completion):\n"
        "    return float('nan')\n"
    )
    return file


def test_a_learners_function_is_a_reward(own):
    assert reward_from_name(f"{own}:shout")(ASKED, "HELLO").value == 1.0
    assert reward_from_name(f"{own}:scored")(ASKED, "x") == Score(0.25, {"a": 1.0}, "because")
    both = reward_from_name(f"correct+0.5*{own}:shout")(ASKED, "THE ANSWER IS 129")
    assert both.value == 1.5


def test_a_learners_mistake_names_file_and_line(own):
    with pytest.raises(CourseError, match=r"mine\.py:7: broken failed with KeyError"):
        reward_from_name(f"{own}:broken")(ASKED, "x")
    with pytest.raises(CourseError, match="returned None"):
        reward_from_name(f"{own}:none")(ASKED, "x")
    with pytest.raises(CourseError, match="returned nan"):
        reward_from_name(f"{own}:nan")(ASKED, "x")
    with pytest.raises(CourseError, match="did you mean shout"):
        reward_from_name(f"{own}:shoot")
    own.write_text("def oops(:\n")
    with pytest.raises(CourseError, match=r"mine\.py:1: cannot be imported, SyntaxError"):
        reward_from_name(f"{own}:oops")


def test_a_batch_reward_sees_every_group_and_can_be_weighted():
    def rank(problems, completions_P_G):
        return [
            [Score(float(text == max(texts, key=len)), {"longest": 1.0}, "") for text in texts]
            for texts in completions_P_G
        ]

    reward = reward_from_name("judge+2*correct", {"judge": BatchReward(rank)})
    scores = score_completions(reward, [ASKED, ASKED], [["129", "no"], ["yes", "129 it is"]])
    assert [[score.value for score in group] for group in scores] == [[3.0, 0.0], [0.0, 1.0]]
    assert math.isclose(scores[0][0].parts["correct"], 1.0)


def test_reward_files_that_leave_the_program_are_told_by_line(tmp_path):
    """sys.exit() passed every `except Exception`: the run ended with rc 0, without a word."""
    script = tmp_path / "script.py"
    script.write_text("import sys\ndef mine(problem, completion):\n    sys.exit()\n")
    with pytest.raises(CourseError, match=r"script\.py:3: mine failed with SystemExit; return"):
        reward_from_name(f"{script}:mine")(ASKED, "x")
    script.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(CourseError, match=r"script\.py:2: cannot be imported, SystemExit: 3; put"):
        reward_from_name(f"{script}:mine")


def test_reward_that_is_stopped_by_hand_stays_stopped(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(problem, completion):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        reward_from_name(f"{file}:mine")(ASKED, "x")
    file.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        reward_from_name(f"{file}:mine")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (
            "Score(1.0, {'a': 'b'}, 'r')",
            r"returned a Score with parts \{'a': 'b'\} \(dict\); give a dict",
        ),
        ("Score(1.0, None, 'r')", r"returned a Score with parts None \(NoneType\); give a dict"),
        ("Score(1.0, {'a': float('nan')}, 'r')", r"returned a Score with parts \{'a': nan\}"),
        (
            "Score(1.0, {'a': 10**400}, 'r')",
            r"returned a Score with parts \{'a': 10+\.\.\.0+\} \(dict\)",
        ),
        (
            "Score(1.0, {}, None)",
            r"returned a Score with reason None \(NoneType\); give the reason as text",
        ),
        ("Score('1', {}, 'r')", r"returned '1' \(str\); return a finite number"),
        ("10**400", r"returned 10+\.\.\.0+ \(int\); return a finite number"),
        ("10**5000", r"returned a number too long to show \(int\); return a finite number"),
    ],
)
def test_reward_values_of_the_wrong_type_are_told(tmp_path, returned, said):
    """A badly filled Score gave a traceback; a part that is NaN reached the metrics."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from course_lib.rewards import Score\n"
        f"def mine(problem, completion):\n    return {returned}\n"
    )
    with pytest.raises(CourseError, match=rf"mine\.py: mine {said}"):
        reward_from_name(f"{file}:mine")(ASKED, "x")


def test_reward_file_messages_have_no_holes(tmp_path):
    """They once read "use" and then nothing, "nul.py:None:" and "rw.py:0:"."""

    def said(content):
        file = tmp_path / "mine.py"
        file.write_bytes(content)
        with pytest.raises(CourseError) as caught:
            reward_from_name(f"{file}:mine")
        return str(caught.value).removeprefix(f"{tmp_path}/")

    assert said(b"") == "mine.py: has no function 'mine'; write def mine(problem, completion):"
    assert said(b"def mine():\n\0").startswith("mine.py: cannot be imported, ")
    assert said(b"\ndef mine(text):\n    return 1\n") == (
        "mine.py:2: mine(text) does not fit the call; write def mine(problem, completion):"
    )
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(CourseError, match=r"folder\.py: is a folder; write reward as FILE"):
        reward_from_name(f"{tmp_path / 'folder.py'}:mine")


def test_reward_functions_of_any_shape_that_fits_are_accepted(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import functools\n"
        "def extra(problem, completion, scale): return scale\n"
        "mine = functools.partial(extra, scale=2)\n"
        "@functools.wraps(extra)\n"
        "def wrapped(*given): return extra(*given, 3)\n"
        "class Callable:\n"
        "    def __call__(self, problem, completion, more=1): return 4\n"
        "made = Callable()\n"
    )
    values = [
        reward_from_name(f"{file}:{n}")(ASKED, "x").value for n in ("mine", "wrapped", "made")
    ]
    assert values == [2.0, 3.0, 4.0]
