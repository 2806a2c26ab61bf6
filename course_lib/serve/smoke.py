"""The smoke test: would a caller of this deployment get an answer? Asked over the real routes.

A deploy must pass it before it is called done. It starts the ASGI app in this process, without a
port, and asks as a client would: not ready or not allowed must look so, and an answer must come.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from course_lib.errors import CourseError
from course_lib.serve.app import create_app
from course_lib.serve.decoder import ServedModel

QUESTION = "What is 23 + 45 + 61?"


@dataclass(frozen=True)
class SmokeResult:
    """What was asked and answered, kept in deploy.json."""

    question: str
    answer: str
    finish_reason: str
    seconds: float


def smoke_test(folder: str | Path, question: str = QUESTION) -> SmokeResult:
    """Ask the model in `folder` one question through the server's own routes, greedily.

    Raises CourseError when a route does not behave, or when asking twice gives two answers.
    """
    with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has an event loop already
        return thread.submit(asyncio.run, _smoke(folder, question)).result()


async def _smoke(folder: str | Path, question: str) -> SmokeResult:
    key = secrets.token_urlsafe(24)
    model = ServedModel.load(folder)
    app = create_app(model, key)
    body = {
        "model": model.name,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 32,
        "logprobs": True,
    }
    try:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://smoke"
        ) as client:
            headers = {"authorization": f"Bearer {key}"}
            _check(folder, await client.get("/ready"), 200)
            _check(folder, await client.post("/v1/chat/completions", json=body), 401)
            start = time.perf_counter()
            first = await client.post("/v1/chat/completions", json=body, headers=headers)
            seconds = time.perf_counter() - start
            again = await client.post("/v1/chat/completions", json=body, headers=headers)
        _check(folder, first, 200)
        _check(folder, again, 200)
    finally:
        model.stop()
    choice = first.json()["choices"][0]
    answer = choice["message"]["content"]
    if again.json()["choices"][0]["message"]["content"] != answer:
        finding = "the same greedy question got two answers"
        raise CourseError(str(folder), finding, "deploy it again")
    return SmokeResult(question, answer, choice["finish_reason"], seconds)


def _check(folder: str | Path, response: httpx.Response, wanted: int) -> None:
    if response.status_code != wanted:
        finding = f"{response.request.url.path} answers {response.status_code}, not {wanted}"
        raise CourseError(str(folder), f"{finding} ({response.text[:200]})", "deploy it again")
