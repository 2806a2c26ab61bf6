"""Completion -> score with reasons: what the policy is paid for.

A reward is a function `(problem, completion) -> Score`. `reward_from_name` makes one from a name,
a weighted sum of names, or a learner's own function in a file:

    correct      correct+0.2*format      correct+-0.1*length      rewards.py:my_function

Every rule here looks at the text alone. `length` and `polite` are proxies, easily gamed: a lesson
does it.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from reprlib import repr as short
from typing import Any

from course_lib.conversations import Message
from course_lib.errors import CourseError
from course_lib.fields import did_you_mean


@dataclass(frozen=True)
class Problem:
    """What the policy is asked: the messages so far, and the answer where one can be checked."""

    messages: tuple[Message, ...]
    answer: str | None = None
    kind: str = ""
    id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A reward, what it is made of (name -> unweighted value), and why."""

    value: float
    parts: dict[str, float]
    reason: str


Reward = Callable[[Problem, str], Score]


@dataclass(frozen=True)
class BatchReward:
    """A reward that sees all groups at once: a tournament compares, a judge model is asked in
    bulk.
    """

    score: Callable[[list[Problem], list[list[str]]], list[list[Score]]]


# ASCII digits only: other scripts' digits would make "the same" answer many answers.
_MINUS = "\u2212"  # the typographic minus sign
_NUMBER = re.compile(rf"[-{_MINUS}]?(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]+)(?:\.[0-9]+)?")
_ANSWER_IS = re.compile(r"\banswer\s+is\b[\s:*$]*", re.IGNORECASE)
_ENDS_NUMBER = re.compile(r"$|[\s.,;:!?)\]}*$\"']")
_LONGEST_NUMBER = 40  # characters; longer ones are no answers, and slow to compare
_POLITE = ("please", "thank", "happy to help", "of course", "you are welcome", "glad to")


def stated_answer(completion: str) -> tuple[str | None, str]:
    """The answer that a completion states, and where it stands or why there is none.

    It is what follows the last "answer is"; a completion that is nothing but an answer states it,
    too.

    >>> stated_answer("23 + 45 = 68. The answer is 68.")
    ('68', 'after "answer is"')
    >>> stated_answer("I add 23 and 45.")
    (None, 'states no answer')
    """
    text = completion.strip()
    if not text:
        return None, "empty completion"
    marks = list(_ANSWER_IS.finditer(text))
    if not marks:
        bare = text.rstrip(".")
        return (bare, "the whole completion") if _is_number(bare) else (None, "states no answer")
    rest = text[marks[-1].end() :]
    number = _NUMBER.match(rest)
    if not number:
        return None, 'no number after "answer is"'
    after = rest[number.end() :]
    if not _ENDS_NUMBER.match(after):
        return None, f"{number[0]!r} runs on into {after[:8]!r}"
    if re.search(r"\d", after):  # any script's digits: hedging in another alphabet is hedging
        return None, "more numbers follow the answer"
    return number[0], 'after "answer is"'


def correct(problem: Problem, completion: str) -> Score:
    """1 for the right answer, else 0.

    A number is compared by value (1,024 is 1024 is 1024.0); any other answer as text without case,
    outer spaces and the full stop.
    """
    wanted = _wanted(problem)
    if not _is_number(wanted):
        said = _ANSWER_IS.split(completion)[-1]
        right = bool(_plain(said)) and _plain(said) == _plain(wanted)
        reason = f"{_plain(said)[:40]!r}, wanted {wanted!r}"
        return Score(float(right), {"correct": float(right)}, "right" if right else reason)
    said, where = stated_answer(completion)
    if said is None:
        return Score(0.0, {"correct": 0.0}, where)
    right = len(said) <= _LONGEST_NUMBER and _value(said) == _value(wanted)
    reason = f"right: {said}" if right else f"{said[:_LONGEST_NUMBER]} is wrong, wanted {wanted}"
    return Score(float(right), {"correct": float(right)}, reason)


def format_reward(problem: Problem, completion: str) -> Score:
    """1 if the completion ends with exactly one sentence "The answer is N.", right or wrong."""
    said, reason = stated_answer(completion)
    count = len(_ANSWER_IS.findall(completion))
    closed = bool(re.search(r"\bThe answer is [^.]*[0-9](\.[0-9]+)?\.$", completion.strip()))
    good = said is not None and count == 1 and closed
    if good:
        reason = "one closing answer sentence"
    elif count > 1:
        reason = f'"answer is" {count} times'
    elif said is not None:
        reason = 'does not end with "The answer is N."'
    return Score(float(good), {"format": float(good)}, reason)


def length(problem: Problem, completion: str) -> Score:
    """Words of the completion over 40, at most 1: longer is better (a proxy, and a naive one)."""
    words = len(completion.split())
    value = min(words, 40) / 40
    return Score(value, {"length": value}, f"{words} words")


def polite(problem: Problem, completion: str) -> Score:
    """Polite words over 3, at most 1, repeats counted (a proxy, and a naive one)."""
    text = completion.lower()
    count = sum(len(re.findall(rf"\b{word}", text)) for word in _POLITE)
    value = min(count, 3) / 3
    return Score(value, {"polite": value}, f"{count} polite words")


REWARDS: dict[str, Reward] = {
    "correct": correct,
    "format": format_reward,
    "length": length,
    "polite": polite,
}


def reward_from_name(
    spec: str, known: dict[str, Reward | BatchReward] | None = None
) -> Reward | BatchReward:
    """The reward that `spec` names: `name`, `file.py:function`, or `name+0.2*name+…`.

    `known` adds rewards to choose from (a trained judge needs a client, so it cannot stand in
    `REWARDS`).
    """
    choices = {**REWARDS, **(known or {})}
    terms = [_term(term, choices, spec) for term in spec.split("+")]
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    return weighted(terms)


def weighted(terms: list[tuple[float, Reward | BatchReward]]) -> Reward | BatchReward:
    """The weighted sum of rewards; the parts stay visible, the reasons are joined."""
    weights = [weight for weight, _ in terms]

    def add(scores: list[Score]) -> Score:
        value = sum(weight * score.value for weight, score in zip(weights, scores, strict=True))
        parts = {name: part for score in scores for name, part in score.parts.items()}
        return Score(value, parts, "; ".join(score.reason for score in scores))

    def one(problem: Problem, completion: str) -> Score:
        return add([reward(problem, completion) for _, reward in terms])  # type: ignore[operator]

    def batch(problems: list[Problem], completions_P_G: list[list[str]]) -> list[list[Score]]:
        by_term = [score_completions(reward, problems, completions_P_G) for _, reward in terms]
        by_group = zip(*by_term, strict=True)
        return [[add(list(each)) for each in zip(*group, strict=True)] for group in by_group]

    together = any(isinstance(reward, BatchReward) for _, reward in terms)
    return BatchReward(batch) if together else one


def score_completions(
    reward: Reward | BatchReward, problems: list[Problem], completions_P_G: list[list[str]]
) -> list[list[Score]]:
    """Every completion's score, whichever kind of reward it is: scores_P_G."""
    if isinstance(reward, BatchReward):
        return reward.score(problems, completions_P_G)
    pairs = zip(problems, completions_P_G, strict=True)
    return [[reward(problem, text) for text in texts_G] for problem, texts_G in pairs]


def reward_from_file(spec: str) -> Reward:
    """A learner's `function(problem, completion)` in `file.py:function`, giving a number or a
    Score.

    Its mistakes are raised, naming the file and line: a bug that quietly scored 0 would look like a
    policy that cannot learn.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    function = _load_function(path, name)

    def own(problem: Problem, completion: str) -> Score:
        try:
            returned = function(problem, completion)
        except CourseError:
            raise
        except (Exception, SystemExit) as error:
            finding = f"{name} failed with {_told(error)}"
            remedy = f"run it on the completion {completion[:60]!r}"
            if isinstance(error, SystemExit):
                remedy = "return a score instead of leaving the program"
            raise CourseError(_place(error, path), finding, remedy) from error
        return _as_score(returned, name, path)

    return own


def _term(
    text: str, choices: dict[str, Reward | BatchReward], spec: str
) -> tuple[float, Reward | BatchReward]:
    """One `weight*name` of a specification."""
    weight_text, star, name = text.strip().rpartition("*")
    try:
        weight = float(weight_text) if star else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        finding = f"{weight_text!r} in {spec!r} is no weight"
        raise CourseError("reward", finding, "write e.g. correct+0.2*format")
    name = name.strip()
    if name in choices:
        return weight, choices[name]
    if ".py:" in name:
        return weight, reward_from_file(name)
    remedy = did_you_mean(name, [*choices, "FILE.py:FUNCTION"])
    raise CourseError("reward", f"{name!r} is unknown", remedy)


def _as_score(returned: Any, name: str, path: Path) -> Score:
    """What a learner's function returned, every field checked: a wrong one would fail far away."""
    if _is_finite(returned):
        return Score(float(returned), {name: float(returned)}, f"{name} gave {returned}")
    value = returned.value if isinstance(returned, Score) else returned
    if not _is_finite(value):
        finding = f"{name} returned {_shown(value)}"
        raise CourseError(str(path), finding, "return a finite number or a Score")
    parts, reason = returned.parts, returned.reason
    if not isinstance(parts, dict) or not all(map(_is_finite, parts.values())):
        finding = f"{name} returned a Score with parts {_shown(parts)}"
        remedy = f'give a dict of finite numbers, e.g. {{"{name}": 0.5}}'
        raise CourseError(str(path), finding, remedy)
    if not isinstance(reason, str):
        finding = f"{name} returned a Score with reason {_shown(reason)}"
        raise CourseError(str(path), finding, "give the reason as text")
    return Score(float(value), {key: float(part) for key, part in parts.items()}, reason)


def _is_finite(value: Any) -> bool:
    """Is it a number that a float can hold? NaN is not, nor is 10**400."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _shown(value: Any) -> str:
    """The value, cut to a readable length, and its type."""
    try:
        text = short(value)
    except ValueError:  # Python does not write out an int of 5,000 digits
        text = "a number too long to show"
    return f"{text} ({type(value).__name__})"


def _load_function(path: Path, name: str) -> Callable[[Problem, str], Any]:
    if not path.is_file():
        finding = "is a folder" if path.is_dir() else "no such file"
        raise CourseError(str(path), finding, "write reward as FILE.py:FUNCTION")
    module_name = f"learner_reward_{path.stem}"
    loader = importlib.util.spec_from_file_location(module_name, path)
    assert loader and loader.loader, "a .py file always has a loader"
    module = importlib.util.module_from_spec(loader)
    sys.modules[module_name] = module  # dataclasses in the file look themselves up
    try:
        loader.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        remedy = "mend the file"
        if isinstance(error, SystemExit):
            remedy = 'put what is a script under if __name__ == "__main__":'
        finding = f"cannot be imported, {_told(error)}"
        raise CourseError(_place(error, path), finding, remedy) from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        remedy = did_you_mean(name, own) if own else f"write def {name}(problem, completion):"
        raise CourseError(str(path), f"has no function {name!r}", remedy)
    _check_parameters(function, name, path)
    return function


def _check_parameters(function: Callable[..., Any], name: str, path: Path) -> None:
    """Raises: CourseError when the function cannot be called with a problem and a completion."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return  # some callables written in C have none: their call will tell
    try:
        signature.bind("problem", "completion")
    except TypeError as error:
        code = getattr(function, "__code__", None)
        place = str(path)
        if code and Path(code.co_filename).name == path.name:
            place = f"{path}:{code.co_firstlineno}"
        remedy = f"write def {name}(problem, completion):"
        raise CourseError(place, f"{name}{signature} does not fit the call", remedy) from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _place(error: BaseException, path: Path) -> str:
    """`path` and the last line of it that the error passed through, if it came that far."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == path.name]
    if isinstance(error, SyntaxError) and Path(error.filename or "").name == path.name:
        lines.append(error.lineno)
    return f"{path}:{lines[-1]}" if lines and lines[-1] else str(path)


def _wanted(problem: Problem) -> str:
    if problem.answer is None:
        remedy = "use another reward (tournament, or your own), or give each problem an answer"
        raise CourseError(problem.id or "problem", "has no answer to check against", remedy)
    return problem.answer


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _value(number: str) -> Decimal:
    return Decimal(number.strip().replace(",", "").replace(_MINUS, "-"))


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()
