"""How does `posttrain serve` hold up? Many streaming chats at once, one after the other, and beside
`transformers serve` on the same model, in one run on one machine.

    python benchmarks/serving.py deploys/posttrain
    python benchmarks/serving.py data/base-model --clients 16

Printed for each: wall seconds, errors, time to the first token (median and 95th percentile), tokens
a second over all clients. `transformers serve` is left out, and said so, where its extra is not
installed (`pip install "transformers[serving]"`). Every client asks its own question, greedily, for
at most --max-tokens tokens; each server answers a few warm-up questions first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from course_lib.export.versions import model_folder
from course_lib.serve.decoder import model_name
from course_lib.world import sum_problem

KEY = "a-key-for-the-benchmark"
SERVE = "import sys; from course_lib.serve import serve; serve(sys.argv[1], port=int(sys.argv[2]))"
START_S = 180


@dataclass
class Tally:
    """What the clients of one scenario saw."""

    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    tokens: int = 0

    def line(self, name: str) -> str:
        if not self.first_token_s:
            return f"| {name} | - | {len(self.errors)} ({self.errors[0][:60]}) | - | - | - |"
        first = sorted(self.first_token_s)
        late = first[min(len(first) - 1, int(0.95 * len(first)))]
        return (
            f"| {name} | {self.seconds:.1f} | {len(self.errors)} | {statistics.median(first):.2f} "
            f"| {late:.2f} | {self.tokens / self.seconds:.0f} |"
        )


async def chat(
    client: openai.AsyncOpenAI, model: str, question: str, max_tokens: int, tally: Tally
) -> None:
    """One streaming chat; whatever goes wrong is counted."""
    start = time.perf_counter()
    first: float | None = None
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces = 0
        used = None
        async for chunk in stream:
            used = chunk.usage or used
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - start
                pieces += 1
        tally.tokens += used.completion_tokens if used else pieces
        tally.first_token_s.append(first or time.perf_counter() - start)
    except (openai.OpenAIError, httpx.HTTPError) as error:
        tally.errors.append(f"{type(error).__name__}: {error}")


async def scenario(
    url: str, model: str, questions: list[str], max_tokens: int, at_once: bool
) -> Tally:
    tally = Tally()
    limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(limits=limits, timeout=600, trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=KEY, max_retries=0, http_client=http
    ) as client:
        for question in questions[:4]:
            await chat(client, model, question, max_tokens, Tally())
        start = time.perf_counter()
        chats = [chat(client, model, q, max_tokens, tally) for q in questions]
        if at_once:
            await asyncio.gather(*chats)
        else:
            for each in chats:
                await each
        tally.seconds = time.perf_counter() - start
    return tally


@contextlib.contextmanager
def running(command: list[str], port: int, ready: str) -> Iterator[str]:
    """A server process, from its first good answer to its end."""
    environment = os.environ | {"POSTTRAIN_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + ready, trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a deploy folder or a model folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=48)
    asked = parser.parse_args()
    rng = random.Random(0)
    questions = [sum_problem(rng, heldout=True).question for _ in range(asked.clients)]
    folder = str(model_folder(Path(asked.folder)).resolve())
    rows = []

    def measure(name: str, url: str, model: str, at_once: bool) -> None:
        tally = asyncio.run(scenario(url, model, questions, asked.max_tokens, at_once))
        rows.append(tally.line(name))
        print(rows[-1], flush=True)

    print(
        "| server | wall s | errors | first token s | 95 % | tokens/s |\n|---|---|---|---|---|---|"
    )
    port = free_port()
    with running([sys.executable, "-c", SERVE, asked.folder, str(port)], port, "/ready") as url:
        name = model_name(asked.folder)
        measure(f"posttrain serve, {asked.clients} at once", url, name, True)
        measure("posttrain serve, one after the other", url, name, False)
    if importlib.util.find_spec("fastapi") is None:
        print('| transformers serve | not run: pip install "transformers[serving]" | | | | |')
        return
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    with running([*command, "--port", str(port)], port, "/health") as url:
        measure(f"transformers serve, {asked.clients} at once", url, folder, True)


if __name__ == "__main__":
    main()
