"""Two models on the same prompts: who answered, who won, how sure is that."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from deploy_models import save_base
from loopback import serving
from own_engine import own_engine
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from course_lib import compare as compare_module
from course_lib.cli import shipping
from course_lib.compare import Row, compare, judged, read_prompts
from course_lib.conversations import Message
from course_lib.errors import CourseError
from course_lib.rewards import BatchReward, Problem, Score
from course_lib.serve import ServedModel, create_app

KEY = "a-key-for-tests"
PROBLEMS = [Problem((Message("user", f"What is {a} + 45 + 61?"),), str(a + 106)) for a in range(4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("compare")
    return save_base(root / "one", seed=1), save_base(root / "two", seed=2)


def row(score_a: float, score_b: float) -> tuple[Row, tuple[float, float]]:
    return Row("q", "a", "b", 0.1, 0.2), (score_a, score_b)


def test_the_win_rate_counts_a_tie_as_half_and_is_bs():
    rows, scores = zip(*[row(0, 1), row(1, 1), row(1, 0), row(0, 1)], strict=True)
    found = judged("a", "b", list(rows), list(scores))
    assert found.win_rate_b == (1 + 0.5 + 0 + 1) / 4
    assert found.wins_ties_losses == (2, 1, 1)
    assert found.interval[0] <= found.win_rate_b <= found.interval[1]
    assert found.median_seconds == (0.1, 0.2)
    assert json.loads(json.dumps(found.as_dict()))["rows"][0]["score_b"] == 1


def test_many_clear_wins_leave_no_doubt_and_few_leave_much():
    def interval(count: int) -> tuple[float, float]:
        rows, scores = zip(*[row(0, 1), row(0, 1), row(1, 0)] * count, strict=True)
        return judged("a", "b", list(rows), list(scores)).interval

    few, many = interval(2), interval(100)
    assert few[0] < 0.5 < many[0] and many[1] - many[0] < few[1] - few[0]


def test_a_folder_its_endpoint_and_its_engine_answer_the_same(folders, tmp_path, monkeypatch):
    one, _ = folders
    monkeypatch.setenv("POSTTRAIN_API_KEY", KEY)
    model = ServedModel.load(one)
    try:
        with serving(create_app(model, KEY)) as url:
            by_url = compare(str(one), f"{url}/v1", PROBLEMS, max_tokens=12)
    finally:
        model.stop()
    assert [r.a for r in by_url.rows] == [r.b for r in by_url.rows]
    assert by_url.win_rate_b == 0.5 and by_url.wins_ties_losses == (0, 4, 0)
    with own_engine(one, tmp_path / "store") as service:
        by_engine = compare("base", str(one), PROBLEMS, service=service, max_tokens=12)
    assert [r.a for r in by_engine.rows] == [r.b for r in by_engine.rows]
    assert [r.b for r in by_engine.rows] == [r.a for r in by_url.rows]


@pytest.mark.parametrize("other", ["nowhere", "http://127.0.0.1:9/v1", "tinker://a/weights/b"])
def test_a_second_side_that_is_not_there_is_told_before_the_first_is_asked(folders, other):
    def asked(name: str, done: int, total: int) -> None:
        raise AssertionError(f"{name} was asked")

    with pytest.raises(CourseError, match=other):
        compare(str(folders[0]), other, PROBLEMS, on_progress=asked)


def test_two_models_differ_and_any_reward_may_judge(folders):
    one, two = map(str, folders)
    seen = []
    found = compare(
        one,
        two,
        PROBLEMS,
        reward=lambda problem, text: Score(float(len(text)), {}, ""),
        max_tokens=8,
        on_progress=lambda name, done, total: seen.append((name, done, total)),
    )
    assert [r.a for r in found.rows] != [r.b for r in found.rows]
    assert [r.score_a for r in found.rows] == [len(r.a) for r in found.rows]
    assert seen[-1] == (two, 4, 4)
    judge = BatchReward(lambda problems, texts: [[Score(0, {}, ""), Score(1, {}, "")]] * 4)
    assert compare(one, two, PROBLEMS, reward=judge, max_tokens=2).win_rate_b == 1


@pytest.mark.parametrize("spoil", ["folder", "root", "below a file", "forbidden"])
def test_a_place_that_cannot_be_written_is_told_before_anybody_is_asked(
    tmp_path, monkeypatch, spoil
):
    """All prompts were asked first, then `.dir.22755.tmp: Is a directory`, and the answers lost."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 23 + 45?"}\n')
    places = {"folder": tmp_path, "root": Path("/"), "below a file": prompts / "x" / "y"}
    out = places.get(spoil, tmp_path / "n" / "x")
    if spoil == "forbidden":  # also where root, who may write everywhere, runs the tests
        monkeypatch.setattr(shipping.os, "access", lambda folder, mode: folder != tmp_path)
    monkeypatch.setattr(compare_module, "compare", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(CourseError) as caught:
        shipping.compare("one", "two", prompts, out=out)
    assert str(caught.value).startswith(f"--out {out}: ")
    assert not (tmp_path / "n").exists()


def test_answers_that_cannot_be_written_name_the_file_that_was_asked_for(
    folders, tmp_path, monkeypatch
):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 23 + 45?"}\n')
    monkeypatch.setattr(os, "fsync", full)
    one, two = map(str, folders)
    with pytest.raises(OSError) as caught:
        shipping.compare(one, two, prompts, max_tokens=2, out=tmp_path / "answers.json")
    assert caught.value.filename == str(tmp_path / "answers.json")


def test_a_checkpoint_is_asked_with_what_was_said_before(folders, tmp_path):
    one, _ = folders
    before = (Message("user", "What is 23 + 45?"), Message("assistant", "68."))
    talk = [Problem((*before, Message("user", "And 61?"))), Problem((Message("user", "And 61?"),))]
    with own_engine(one, tmp_path / "store") as service:
        found = compare("base", str(one), talk, service=service, max_tokens=12)
    assert [each.a for each in found.rows] == [each.b for each in found.rows]
    assert found.rows[0].a != found.rows[1].a


def test_prompts_without_answers_are_shown_and_not_judged(folders):
    one, two = map(str, folders)
    found = compare(one, two, [Problem((Message("user", "Hello"),))], max_tokens=4)
    assert found.win_rate_b is None and found.interval is None and found.rows[0].score_a is None


def test_prompts_are_read_in_both_forms(tmp_path):
    rows = [
        {"prompt": "1 + 1?", "answer": 2},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = read_prompts(path)
    assert (first.messages, first.answer) == ((Message("user", "1 + 1?"),), "2")
    assert (second.messages, second.answer) == ((Message("user", "x"),), None)


def test_a_reply_that_states_a_number_is_what_the_sides_are_checked_against(tmp_path):
    """So the shipped held-out conversations give a win rate without a file of answers."""
    asked = {"role": "user", "content": "1 + 1?"}
    replies = ["1 + 1 = 2. The answer is 2.", "Mira keeps a goat."]
    rows = [{"messages": [asked, {"role": "assistant", "content": reply}]} for reply in replies]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"answer": 3}])))
    assert [problem.answer for problem in read_prompts(path)] == ["2", None, "3"]
    assert all(problem.messages == (Message("user", "1 + 1?"),) for problem in read_prompts(path))


def test_where_only_some_prompts_have_an_answer_only_these_are_judged(folders):
    one, two = map(str, folders)
    unknown = Problem((Message("user", "Hello"),))
    found = compare(one, two, [unknown, *PROBLEMS], max_tokens=4)
    assert len(found.rows) == 1 + len(PROBLEMS) == 1 + sum(found.wins_ties_losses)
    assert [row.score_a is None for row in found.rows] == [True] + [False] * len(PROBLEMS)


BAD_PROMPTS = {
    "cut": (b"{", "not JSON"),
    "list": (b"[]", "holds no prompt"),
    "other field": (b'{"x": 1}', "holds no prompt"),
    "no content": (b'{"messages": [{"role": "user"}]}', "holds no prompt"),
    "null": (b'{"messages": [{"role": "user", "content": null}]}', "holds no prompt"),  # "None"?
    "no message": (b'{"messages": []}', "holds no prompt"),
    "answer alone": (b'{"messages": [{"role": "assistant", "content": "2"}]}', "nothing is asked"),
    "latin-1": (b'{"prompt": "\xfc"}', "byte 13 .* is not UTF-8"),
    "deep": (b"[" * 100_000, ".*nested too deep"),
    "surrogate": (rb'{"prompt": "\ud800"}', "holds half a character"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_bad_prompt_is_told_by_its_line(tmp_path, case):
    line, said = BAD_PROMPTS[case]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' + line + b"\n")
    with pytest.raises(CourseError, match=rf"p\.jsonl:2: {said}"):
        read_prompts(path)


def test_a_file_that_is_not_there_and_one_without_prompts_are_told(tmp_path):
    with pytest.raises(CourseError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CourseError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl")


def test_a_wrong_key_and_a_missing_service_are_one_sentence(folders, monkeypatch):
    one, _ = folders
    monkeypatch.setenv("POSTTRAIN_API_KEY", "another-key")
    model = ServedModel.load(one)
    try:
        with (
            serving(create_app(model, KEY)) as url,
            pytest.raises(CourseError, match=r"401.*check the URL"),
        ):
            compare(str(one), f"{url}/v1", PROBLEMS[:1])
    finally:
        model.stop()
    with pytest.raises(CourseError, match="needs a Tinker service"):
        compare("tinker://a/weights/b", str(one), PROBLEMS[:1])


@pytest.mark.parametrize(
    ("models", "answer", "said"),
    [
        ({}, {}, "data.0.id"),
        ({"data": []}, {}, "data.0.id"),
        ([], {}, "data.0.id"),
        ({"data": [{"id": "m"}]}, {"error": "busy"}, "choices.0.message.content"),
        (
            {"data": [{"id": "m"}]},
            {"choices": [{"message": {"content": None}}]},
            "choices.0.message.content",
        ),
    ],
)
def test_an_endpoint_that_answers_something_else_is_one_sentence(models, answer, said):
    """These were a KeyError, an IndexError, a TypeError; a null was graded as if it were text."""

    async def get(request):
        return JSONResponse(models)

    async def post(request):
        return JSONResponse(answer)

    routes = [Route("/v1/models", get), Route("/v1/chat/completions", post, methods=["POST"])]
    with (
        serving(Starlette(routes=routes)) as url,
        pytest.raises(CourseError, match=rf"/v1: answers without a text in {said}; check the URL"),
    ):
        compare(f"{url}/v1", f"{url}/v1", PROBLEMS[:1])


def test_an_address_that_is_none_is_one_sentence():
    with pytest.raises(CourseError, match=r"http://\[::1: Invalid port.*; check the URL"):
        compare("http://[::1", "base", PROBLEMS)


def test_without_prompts_there_is_nothing_to_compare():
    with pytest.raises(CourseError, match=r"^problems: there is none to ask; give at least one"):
        compare("base", "nowhere", [])


def endpoint(asked: list[str]) -> Starlette:
    """Answers like a model, and writes down what it was asked."""

    async def models(request):
        return JSONResponse({"data": [{"id": "m"}]})

    async def chat(request):
        asked.append((await request.json())["messages"][-1]["content"])
        return JSONResponse({"choices": [{"message": {"content": "The answer is 106."}}]})

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    return Starlette(routes=routes)


def test_each_side_is_warmed_up_with_the_first_prompt_and_then_asked_each_once(monkeypatch):
    """Past a proxy that the environment names: it does not know this machine's servers."""
    asked: list[str] = []
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(endpoint(asked)) as url:
        compare(f"{url}/v1", f"{url}/v1/", PROBLEMS)
    once = [problem.messages[-1].content for problem in PROBLEMS]
    assert asked == [once[0], *once] * 2


def test_an_endpoint_elsewhere_is_asked_through_the_proxy_that_the_environment_names(monkeypatch):
    asked: list[str] = []
    with serving(endpoint(asked)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        compare("http://model.example/v1", "http://model.example/v1", PROBLEMS[:1])
    assert asked


def test_a_folders_model_is_stopped_when_it_has_answered(folders):
    before = set(threading.enumerate())
    compare(*map(str, folders), PROBLEMS[:1], max_tokens=2)
    assert set(threading.enumerate()) <= before
