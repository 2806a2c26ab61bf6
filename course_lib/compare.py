"""Before you ship: two models on the same prompts, side by side.

    compare("deploys/sums", "base", read_prompts("prompts.jsonl"), service=service)

Each side is a deploy or model folder, a tinker:// checkpoint, `base`, or an endpoint's URL. Every
prompt is asked of both, one at a time and greedily, so that the seconds are comparable; a reward
says which answer is better, and a tie counts half.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from course_lib.config import find_file
from course_lib.conversations import Message, prompt_messages, sound_lines
from course_lib.errors import CourseError
from course_lib.metrics import bootstrap_interval
from course_lib.rewards import (
    BatchReward,
    Problem,
    Reward,
    correct,
    score_completions,
    stated_answer,
)

if TYPE_CHECKING:
    from course_lib.client import CourseService

Ask = Callable[[tuple[Message, ...]], str]
Progress = Callable[[str, int, int], None]
MAX_TOKENS = 128  # of each answer
KEY_VARIABLE = "POSTTRAIN_API_KEY"


@dataclass(frozen=True)
class Row:
    """One prompt and what the two sides said. Scores are None where nothing can judge."""

    prompt: str
    a: str
    b: str
    seconds_a: float
    seconds_b: float
    score_a: float | None = None
    score_b: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All rows, and how often B beats A."""

    a: str
    b: str
    rows: list[Row]
    win_rate_b: float | None  # share of prompts on which B scores higher; a tie counts half
    interval: tuple[float, float] | None  # 95 %, over prompts
    wins_ties_losses: tuple[int, int, int] | None  # as B sees it

    @property
    def median_seconds(self) -> tuple[float, float]:
        """The middle answer's time of each side: the slowest one is often only the first."""
        return median(r.seconds_a for r in self.rows), median(r.seconds_b for r in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a JSON file."""
        return asdict(self) | {"median_seconds": list(self.median_seconds)}


def compare(
    a: str,
    b: str,
    problems: list[Problem],
    *,
    service: CourseService | None = None,
    reward: Reward | BatchReward | None = None,
    max_tokens: int = MAX_TOKENS,
    on_progress: Progress | None = None,
) -> Comparison:
    """Ask both sides every problem.

    Without `reward` those with an answer are checked against it, and only they are judged.
    """
    if not problems:
        remedy = "give at least one, for instance with read_prompts"
        raise CourseError("problems", "there is none to ask", remedy)
    sides = {}
    for name in (a, b):  # who is not there is told before the other has answered for minutes
        _check_side(name, service, max_tokens)
    for name in (a, b):
        sides[name] = _answers(name, problems, service, max_tokens, on_progress)
    rows = []
    for i, problem in enumerate(problems):
        (text_a, seconds_a), (text_b, seconds_b) = sides[a][i], sides[b][i]
        rows.append(Row(problem.messages[-1].content, text_a, text_b, seconds_a, seconds_b))
    chosen = [i for i, p in enumerate(problems) if reward is not None or p.answer is not None]
    if not chosen:
        return Comparison(a, b, rows, None, None, None)
    texts = [[rows[i].a, rows[i].b] for i in chosen]
    scores = score_completions(reward or correct, [problems[i] for i in chosen], texts)
    pairs = [(one.value, other.value) for one, other in scores]
    found = judged(a, b, [rows[i] for i in chosen], pairs)
    for i, row in zip(chosen, found.rows, strict=True):
        rows[i] = row
    return replace(found, rows=rows)


def judged(a: str, b: str, rows: list[Row], scores: list[tuple[float, float]]) -> Comparison:
    """The comparison with its scores, (A's, B's) for each row."""
    rows = [
        replace(row, score_a=one, score_b=other)
        for row, (one, other) in zip(rows, scores, strict=True)
    ]
    wins = [1.0 if other > one else 0.5 if other == one else 0.0 for one, other in scores]
    counts = (wins.count(1.0), wins.count(0.5), wins.count(0.0))
    return Comparison(a, b, rows, sum(wins) / len(wins), bootstrap_interval(wins), counts)


def read_prompts(path: str | Path) -> list[Problem]:
    """Problems from JSONL: {"prompt": "..."} or {"messages": [...]}, and "answer" if there is one.

    A conversation that ends with an assistant message is asked without it; a number that this
    message gives as "the answer" is what the two sides are checked against.
    """
    lines = sound_lines(str(find_file(path)), "give a JSONL file")
    problems = [_problem(row, place) for place, row in lines]
    if not problems:
        raise CourseError(str(path), "holds no prompts", 'write {"prompt": "..."} lines')
    return problems


def _problem(row: Any, place: str) -> Problem:
    try:
        messages = list(prompt_messages(row["prompt"] if "prompt" in row else row["messages"]))
    except (KeyError, TypeError):
        messages = []
    if not messages:
        remedy = 'write {"prompt": "..."} or {"messages": [...]}'
        raise CourseError(place, "holds no prompt", remedy)
    answer = row.get("answer")
    if messages[-1].role == "assistant":
        reply = messages.pop().content
        answer = stated_answer(reply)[0] if answer is None else answer
    if not messages:
        raise CourseError(place, "nothing is asked", "add a user message")
    return Problem(tuple(messages), None if answer is None else str(answer), id=place)


# --- who answers ----------------------------------------------------------------------------------


def _answers(
    name: str,
    problems: list[Problem],
    service: CourseService | None,
    max_tokens: int,
    on_progress: Progress | None,
) -> list[tuple[str, float]]:
    """(answer, seconds) to every problem, one at a time."""
    answers = []
    with open_side(name, service, max_tokens) as ask:
        ask(problems[0].messages)  # what only the first call costs belongs to nobody
        for i, problem in enumerate(problems, start=1):
            start = time.perf_counter()
            text = ask(problem.messages)
            answers.append((text, time.perf_counter() - start))
            if on_progress:
                on_progress(name, i, len(problems))
    return answers


def _check_side(name: str, service: CourseService | None, max_tokens: int) -> None:
    """Raises CourseError if nobody answers to `name`; a folder's model is not loaded for that."""
    from course_lib.export.versions import model_folder

    if name != "base" and "://" not in name:
        model_folder(name)
        return
    with open_side(name, service, max_tokens):
        pass


@contextmanager
def open_side(name: str, service: CourseService | None, max_tokens: int) -> Iterator[Ask]:
    """A function that answers for `name`: a folder, a URL, a tinker:// path, or `base`."""
    if name.startswith(("http://", "https://")):
        with _endpoint(name, max_tokens) as ask:
            yield ask
    elif name.startswith("tinker://") or name == "base":
        yield _checkpoint(name, service, max_tokens)
    else:
        with _folder(name, max_tokens) as ask:
            yield ask


def _checkpoint(name: str, service: CourseService | None, max_tokens: int) -> Ask:
    from course_lib.chat import open_speakers

    if service is None:
        raise CourseError(name, "needs a Tinker service", "pass service=connect()")
    [speaker] = open_speakers(service, [name], temperature=0.0, max_tokens=max_tokens)

    def ask(messages: tuple[Message, ...]) -> str:
        speaker.messages = list(messages[:-1])
        return speaker.say(messages[-1].content)

    return ask


@contextmanager
def _folder(name: str, max_tokens: int) -> Iterator[Ask]:
    from course_lib.serve import ServedModel

    model = ServedModel.load(name)
    try:
        yield lambda messages: model.answer(list(messages), max_tokens)
    finally:
        model.stop()


@contextmanager
def _endpoint(url: str, max_tokens: int) -> Iterator[Ask]:
    """An OpenAI-compatible endpoint, ".../v1"; the key is POSTTRAIN_API_KEY."""
    import httpx

    key = os.environ.get(KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    remedy = f"check the URL (it ends with /v1), and {KEY_VARIABLE}"
    try:
        outside = httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1")
    except httpx.InvalidURL as error:
        raise CourseError(url, str(error), remedy) from None
    with httpx.Client(headers=headers, timeout=900, trust_env=outside) as client:

        def call(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
            try:
                answer = client.request(method, f"{url.rstrip('/')}{path}", json=body)
                answer.raise_for_status()
                return answer.json()
            except (httpx.HTTPError, ValueError) as error:
                raise CourseError(url, str(error).split("\n")[0], remedy) from None

        def text_in(answer: Any, *path: str | int) -> str:
            try:
                for key in path:
                    answer = answer[key]
            except (LookupError, TypeError):
                answer = None
            if not isinstance(answer, str):
                finding = f"answers without a text in {'.'.join(map(str, path))}"
                raise CourseError(url, finding, remedy)
            return answer

        model = text_in(call("GET", "/models"), "data", 0, "id")

        def ask(messages: tuple[Message, ...]) -> str:
            body = {
                "model": model,
                "messages": [vars(message) for message in messages],
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            answer = call("POST", "/chat/completions", body)
            return text_in(answer, "choices", 0, "message", "content")

        yield ask
