"""The server, asked by the real openai client and by curl; its answers are the engine's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
from deploy_models import save_base, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import serving

from course_lib.conversations import Message
from course_lib.engine.model import BaseModel
from course_lib.engine.requests import SampleRequest
from course_lib.engine.sampler import Sampler
from course_lib.errors import CourseError
from course_lib.rendering import parse_completion, render_prompt, stop_token_ids
from course_lib.serve import ServedModel, create_app, smoke_test
from course_lib.serve.generate import Piece
from course_lib.serve.limits import ServeLimits
from course_lib.serve.replies import Writer
from course_lib.serve.text import Detokenizer, StopFinder

KEY = "a-key-for-tests"
CHAT = [{"role": "user", "content": "What is 23 + 45 + 61?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path):
    served = ServedModel.load(folder)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def url(model: ServedModel):
    with serving(create_app(model, KEY)) as address:
        yield address


@pytest.fixture
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def engine_answers(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[str]:
    """The engine's own greedy answers, decoded one at a time."""
    base = BaseModel.load(str(folder), "tiny")
    sampler = Sampler(base)
    texts = []
    for prompt in prompts:
        request = SampleRequest(
            np.array(prompt), 1, max_tokens, 0.0, stop=stop_token_ids(base.tokenizer)
        )
        future = sampler.submit(request, base.sampler_weights(None))
        sampler.run_until_idle()
        texts.append(parse_completion(future.result().sequences[0].tokens, base.tokenizer))
    return texts


# --- answers --------------------------------------------------------------------------------------


def test_greedy_chats_are_the_engines_answers(client, folder, model):
    questions = [f"What is {a} + {b} + 61?" for a in (23, 45, 7) for b in (1, 99)]
    prompts = [render_prompt([Message("user", q)], model.tokenizer) for q in questions]
    answers = [
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=24,
        )
        .choices[0]
        .message.content
        for question in questions
    ]
    assert answers == engine_answers(folder, prompts, 24)
    assert len(set(answers)) > 1


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == (
        whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 5
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []


def test_usage_counts_prompt_and_answer(client, model):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=5, seed=1)
    prompt = render_prompt([Message("user", CHAT[0]["content"])], model.tokenizer)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens <= 5
    assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_n_choices_differ_and_a_seed_repeats_them(client):
    asked = {"model": "tiny", "messages": CHAT, "n": 4, "seed": 7, "max_tokens": 12}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 4 and [c.index for c in first.choices] == [0, 1, 2, 3]


def test_equal_prompts_of_one_request_get_different_answers_by_the_same_seed(client):
    asked = {"model": "tiny", "prompt": ["What is"] * 2, "n": 2, "seed": 7, "max_tokens": 12}
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 4


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client):
    asked = {"model": "tiny", "prompt": "What is", "temperature": 0, "max_tokens": 40}
    whole = client.completions.create(**asked).choices[0]
    stop = whole.text[6:9]
    cut = client.completions.create(**asked, stop=[stop, "never seen"]).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text


def test_chat_logprobs_are_the_engines_and_sum_to_one_over_the_alternatives(client, model):
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens - (
        answer.choices[0].finish_reason == "stop"
    )
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the best
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert sum(np.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
        assert bytes(entry.bytes).decode() == entry.token


def test_completions_take_texts_and_token_ids_and_give_logprobs(client, model):
    ids = model.encode("What is")
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 5, "logprobs": 2}
    by_text = client.completions.create(prompt="What is", **asked)
    by_ids = client.completions.create(prompt=ids, **asked)
    both = client.completions.create(prompt=["What is", "The mill"], n=2, seed=0, **asked)
    assert by_text.choices == by_ids.choices
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == by_text.choices[0].text
    table = by_text.choices[0].logprobs
    assert "".join(table.tokens).startswith(by_text.choices[0].text[:1])
    assert len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset)
    assert table.text_offset[0] == 0


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "posttrain"


def test_curl_gets_an_answer_and_a_stream(url):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    body = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 8}
    command = ["curl", "-sS", "--noproxy", "*", f"{url}/v1/chat/completions", "-d"]
    headers = ["-H", "content-type: application/json", "-H", f"authorization: Bearer {KEY}"]

    def curl(asked: dict) -> str:
        done = subprocess.run(
            [*command, json.dumps(asked), *headers], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole = json.loads(curl(body))["choices"][0]["message"]["content"]
    lines = [line for line in curl(body | {"stream": True}).splitlines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == whole


# --- many at once ---------------------------------------------------------------------------------


def test_many_streams_at_once_get_what_each_gets_alone(url):
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"What is {number} + 45 + 61?"}],
            temperature=0,
            max_tokens=12,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together(numbers: list[int]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in numbers))

    numbers = list(range(24))
    crowd = asyncio.run(together(numbers))
    alone = [asyncio.run(together([number]))[0] for number in numbers[:6]]
    assert crowd[:6] == alone


def test_more_than_the_limit_is_told_to_come_again(model, monkeypatch):
    step = model._sampler.step

    def slowly() -> bool:  # or the first is over before the second asks
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(model._sampler, "step", slowly)
    limits = ServeLimits(in_flight=3, choices=3)
    with serving(create_app(model, KEY, limits)) as url:
        body = {"model": "tiny", "messages": CHAT, "n": 2, "max_tokens": 200, "stream": True}
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers):
            busy = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
            assert busy.status_code == 429 and busy.headers["retry-after"] == "1"
        deadline = time.monotonic() + 20
        while (
            answer := httpx.post(
                f"{url}/v1/chat/completions", json=body | {"max_tokens": 2}, headers=headers
            )
        ).status_code == 429:
            assert time.monotonic() < deadline, "a caller who hung up still holds a place"
            time.sleep(0.05)
        assert answer.status_code == 200


def test_a_caller_who_hangs_up_is_not_decoded_for(url, model):
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 200, "stream": True}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as stream:
        next(stream.iter_lines())
    deadline = time.monotonic() + 20
    while model._sampler._running or model._sampler._waiting:
        assert time.monotonic() < deadline, "decoding goes on for nobody"
        time.sleep(0.02)


# --- refusals -------------------------------------------------------------------------------------

GOOD = {"model": "tiny", "messages": CHAT, "max_tokens": 2}
BAD = {
    "no messages": ({"messages": []}, 400, "messages"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, 400, "messages[0].role"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content",
    ),
    "half a character": (
        {"messages": [*CHAT, {"role": "user", "content": "\ud800"}]},
        400,
        "messages[1].content",
    ),
    "half a character's name": ({"\ud800": 1}, 400, "?"),
    "no model": ({"model": None}, 400, "model"),
    "another model": ({"model": "gpt-4o"}, 404, "model"),
    "hot": ({"temperature": 3}, 400, "temperature"),
    "bool as number": ({"temperature": True}, 400, "temperature"),
    "top_p zero": ({"top_p": 0}, 400, "top_p"),
    "too long": ({"max_tokens": 100_000}, 400, "max_tokens"),
    "long prompt": ({"messages": [{"role": "user", "content": "x" * 4000}]}, 400, "messages"),
    "many": ({"n": 99}, 400, "n"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "unknown field": ({"guided_json": {}}, 400, "guided_json"),
    "empty stop": ({"stop": [""]}, 400, "stop"),
    "top without logprobs": ({"top_logprobs": 2}, 400, "top_logprobs"),
    "stream of alternatives": (
        {"stream": True, "logprobs": True, "top_logprobs": 2},
        400,
        "top_logprobs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_cannot_be_met_is_refused_by_its_field(url, case):
    change, status, param = BAD[case]
    headers = {"authorization": f"Bearer {KEY}"}
    body = json.dumps(GOOD | change)
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert answer.json()["error"]["message"]


def test_a_request_without_a_model_is_told_so_and_which_there_is(url):
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/chat/completions", json={}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "model is missing; there is 'tiny'"


@pytest.mark.parametrize("prompt", ["\ud800", ["a", "\ud800"]])
def test_a_prompt_with_half_a_character_is_refused(url, prompt):
    headers = {"authorization": f"Bearer {KEY}"}
    body = json.dumps({"model": "tiny", "prompt": prompt})
    answer = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_a_stop_that_cannot_occur_stops_nothing(url):
    headers = {"authorization": f"Bearer {KEY}"}
    body = json.dumps(GOOD | {"stop": "\ud800"})
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 200


def test_an_answer_that_may_not_fit_behind_its_prompt_is_refused_as_too_long(url, model):
    longest = model.base.context_length - len(model.render([Message("user", CHAT[0]["content"])]))
    headers = {"authorization": f"Bearer {KEY}"}
    body = GOOD | {"max_tokens": longest + 1}
    error = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    body["max_tokens"] = longest
    assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code == 200


def test_fields_that_ask_for_nothing_are_taken(client):
    client.chat.completions.create(
        **GOOD, presence_penalty=0, user="ada", response_format={"type": "text"}
    )


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong-key-here", f"Basic {KEY}"])
def test_without_the_key_nothing_under_v1_answers(url, header):
    headers = {} if header is None else {"authorization": header}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/x")):
        assert httpx.request(method, url + path, headers=headers, json=GOOD).status_code == 401


def test_the_openai_client_sees_a_wrong_key_as_its_own_error(url):
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong-key-here") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_body_too_large_or_not_json_is_refused(url):
    headers = {"authorization": f"Bearer {KEY}"}
    path = f"{url}/v1/chat/completions"
    assert httpx.post(path, content=b"{" * 2_000_000, headers=headers).status_code == 413
    for content in (b"{", b"[]", b"\xff", b"[" * 100_000):
        assert httpx.post(path, content=content, headers=headers).status_code == 400
    assert httpx.get(f"{url}/v1/nothing", headers=headers).status_code == 404


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["messages", "max_tokens", "temperature", "n", "stop", "seed", "stream"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
            ),
        ),
    )
)
def test_no_body_makes_the_server_fail(url, body):
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 1} | body
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(asked), headers=headers)
    assert answer.status_code in (200, 400), answer.text


def test_a_short_key_is_refused_before_anything_starts(model):
    with pytest.raises(CourseError, match="shorter than 8 characters"):
        create_app(model, "secret")


# --- life and death -------------------------------------------------------------------------------


def test_health_answers_while_the_model_loads_and_ready_does_not(folder, monkeypatch):
    right = ServedModel.load

    def slow(source):
        time.sleep(1)
        return right(source)

    monkeypatch.setattr(ServedModel, "load", slow)
    headers = {"authorization": f"Bearer {KEY}"}
    with serving(create_app(folder, KEY)) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 503
        early = httpx.post(f"{url}/v1/chat/completions", json=GOOD, headers=headers)
        assert early.status_code == 503 and early.json()["error"]["code"] == "not_ready"
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = httpx.post(f"{url}/v1/chat/completions", json=GOOD, headers=headers)
        assert answer.status_code == 200


def reason_not_ready(source: Path) -> str:
    """What /ready says once loading has ended without a model."""
    with serving(create_app(source, KEY)) as url:
        deadline = time.monotonic() + 30
        while True:
            answer = httpx.get(f"{url}/ready")
            assert answer.status_code == 503 and time.monotonic() < deadline
            if (message := answer.json()["error"]["message"]) != "loading":
                return message
            time.sleep(0.05)


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    shutil.copytree(folder, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return tmp_path / "damaged"


def test_weights_that_cannot_be_read_are_the_reason_why_it_is_not_ready(damaged):
    """It said "loading" for ever."""
    message = reason_not_ready(damaged)
    start = f"the model cannot be loaded: {damaged}: the weights cannot be read"
    assert message.startswith(start)


def test_whatever_else_keeps_the_model_from_loading_is_told_too(folder, monkeypatch, caplog):
    def broken(source):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(ServedModel, "load", broken)
    message = reason_not_ready(folder)
    assert f"{folder}: loading failed (RuntimeError: out of luck); see" in message
    assert "Traceback" in caplog.text


def test_a_server_that_could_not_load_stays_up_and_then_ends_with_the_reason(damaged):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(damaged)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        url = process.stdout.readline().strip().removeprefix("OPENAI_BASE_URL=")
        said = process.stderr.readline()
        assert "the weights cannot be read" in said
        assert httpx.get(f"{url.removesuffix('/v1')}/health").status_code == 200
        process.send_signal(signal.SIGINT)
        assert "CourseError" in process.communicate(timeout=30)[1] and process.returncode == 1
    finally:
        process.kill()


def test_an_event_is_one_line_whatever_the_model_says():
    """httpx cut it at U+0085, and what came first was no JSON."""
    said = "one\u2028two\x85three \N{WAVE DASH}"
    writer = Writer(SimpleNamespace(name="tiny"), SimpleNamespace(chat=True, logprobs=False))
    line, empty = writer.event(Piece(0, said)).decode().splitlines()
    assert empty == ""
    [choice] = json.loads(line.removeprefix("data: "))["choices"]
    assert choice["delta"]["content"] == said


SERVER = """
import sys
from course_lib.serve import serve
serve(sys.argv[1], port=0, key="a-key-for-tests", say=lambda line: print(line, flush=True))
"""


def test_a_stop_finishes_what_is_running_and_takes_nothing_new(folder):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, env=environment
    )
    try:
        url = process.stdout.readline().decode().strip().removeprefix("OPENAI_BASE_URL=")
        root = url.removesuffix("/v1")
        deadline = time.monotonic() + 60
        while not _answers(f"{root}/ready"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 150, "n": 8, "stream": True}
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, headers=headers) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
        ends = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
        assert len(ends) == 8
        assert process.wait(30) == -signal.SIGTERM, "uvicorn ends by the signal it was sent"
        assert not _answers(f"{root}/health")
    finally:
        process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    with pytest.raises(CourseError, match="nothing is deployed here"):
        ServedModel.load(tmp_path)


def test_the_smoke_test_passes_a_good_folder_and_says_what_is_wrong_with_a_bad_one(
    folder, tmp_path
):
    assert smoke_test(folder).answer
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(CourseError, match="the chat template refuses the messages"):
        smoke_test(broken)


# --- text -----------------------------------------------------------------------------------------

TOKENIZER = tiny_tokenizer()


@given(st.text(max_size=30))
def test_text_given_out_token_by_token_is_the_text_of_all_tokens(text):
    tokens = TOKENIZER.encode(text)
    stream = Detokenizer(TOKENIZER)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.rest() == TOKENIZER.decode(tokens)


def test_a_character_in_several_tokens_comes_whole():
    tokens = TOKENIZER.encode("🧭")
    assert len(tokens) > 1
    stream = Detokenizer(TOKENIZER)
    assert [stream.add(token) for token in tokens] == [""] * (len(tokens) - 1) + ["🧭"]


def test_unfinished_bytes_are_shown_at_the_end():
    stream = Detokenizer(TOKENIZER)
    assert stream.add(TOKENIZER.encode("🧭")[0]) == "" and stream.rest() == "\ufffd"


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_a_stop_text_is_found_wherever_the_pieces_are_cut(text, stops):
    finder = StopFinder(tuple(stops))
    shown = ""
    for letter in text:
        shown += finder.add(letter)
        if finder.found:
            break
    shown += finder.rest()
    # by hand: the text up to the stop text that is complete first (the earliest begin among them)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first_end = min(ends)[0] if ends else None
    begins = [b for e, b in ends if e == first_end]
    assert shown == (text[: min(begins)] if ends else text)
    assert finder.found == bool(ends)


def test_a_request_that_breaks_decoding_between_two_looks_does_not_end_the_thread(folder: Path):
    served = ServedModel.load(folder)
    step, tried = served._sampler.step, list[Future]()

    def step_and_then_one_more_comes() -> bool:
        if len(tried) == 1:
            tried.append(Future())
            raise RuntimeError("the request that came in between breaks")
        more = step()
        if not more and not tried:
            tried.append(served.submit(SampleRequest(np.array([1, 2]), max_tokens=2)))
        return more

    served._sampler.step = step_and_then_one_more_comes
    first = served.submit(SampleRequest(np.array([1, 2]), max_tokens=2))
    assert first.result(30).sequences
    deadline = time.monotonic() + 30
    while not tried and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(CancelledError):
        tried[0].result(30)
    last = served.submit(SampleRequest(np.array([1, 2]), max_tokens=2))
    assert last.result(30).sequences
    assert served._thread.is_alive()
    served.stop()
