"""How does `posttrain serve` hold up? Many streaming chats at once, one after the other, and beside
`transformers serve` on the same model, in one run on one machine.

    python tests/benchmarks/serve_load.py         # 64 chats with what served_answers.py deployed
    python tests/benchmarks/serve_load.py deploys/posttrain --clients 16 --rounds 5

Each server answers a few questions before the clock runs. Each client asks its own question,
greedily, for at most --max-tokens tokens. The lines are medians over the rounds; errors are summed.
`transformers serve` needs fastapi (the `bench` extra). Kept in data/results/serve_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import openai
from served import KEY, ROOT, free_port, keep, machine, posttrain_serve, running

from course_lib.export.versions import model_folder
from course_lib.serve.decoder import model_name
from course_lib.world import sum_problem

HEAD = (
    "server",
    "wall s",
    "errors",
    "first token s",
    "95 % s",
    "tokens",
    "tokens/s",
    "same answers",
)


@dataclass
class Tally:
    """What the clients of one round saw."""

    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: dict[str, str] = field(default_factory=dict)


async def chat(
    client: openai.AsyncOpenAI, model: str, question: str, max_tokens: int, tally: Tally
) -> None:
    """One streaming chat; whatever goes wrong is counted."""
    start = time.perf_counter()
    first, pieces, used = None, [], None
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            used = chunk.usage or used
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - start
                pieces.append(chunk.choices[0].delta.content)
    except (openai.OpenAIError, httpx.HTTPError) as error:
        tally.errors.append(f"{type(error).__name__}: {error}"[:200])
        return
    tally.tokens += used.completion_tokens if used else len(pieces)
    tally.first_token_s.append(first or time.perf_counter() - start)
    tally.answers[question] = "".join(pieces)


async def one_round(
    url: str, model: str, questions: list[str], max_tokens: int, at_once: bool
) -> Tally:
    """All questions once, after four that are not counted."""
    tally = Tally()
    limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(limits=limits, timeout=600, trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=KEY, max_retries=0, http_client=http
    ) as client:
        for question in questions[:4]:
            await chat(client, model, question, max_tokens, Tally())
        start = time.perf_counter()
        chats = [chat(client, model, each, max_tokens, tally) for each in questions]
        if at_once:
            await asyncio.gather(*chats)
        else:
            for each in chats:
                await each
        tally.seconds = time.perf_counter() - start
    return tally


def summary(name: str, rounds: list[Tally], reference: dict[str, str]) -> dict[str, Any]:
    """Medians over the rounds, errors in all, and how many answers equal the reference's."""
    good = [each for each in rounds if each.first_token_s]
    errors = [error for each in rounds for error in each.errors]
    row: dict[str, Any] = {"server": name, "rounds": len(rounds), "errors": len(errors)}
    if errors:
        row["first_error"] = errors[0]
    if good:
        late = [sorted(e.first_token_s)[int(0.95 * (len(e.first_token_s) - 1))] for e in good]
        row |= {
            "wall_s": round(median(each.seconds for each in good), 3),
            "first_token_s": round(median(median(each.first_token_s) for each in good), 4),
            "first_token_95_s": round(median(late), 4),
            "tokens": good[-1].tokens,
            "tokens_per_s": round(median(each.tokens / each.seconds for each in good), 1),
            "same_answers": sum(good[-1].answers.get(q) == a for q, a in reference.items()),
        }
    return row


def line(row: dict[str, Any]) -> str:
    keys = ("wall_s", "errors", "first_token_s", "first_token_95_s", "tokens", "tokens_per_s")
    cells = [row["server"], *(str(row.get(key, "-")) for key in (*keys, "same_answers"))]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", default="runs/served-answers/sums")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/serve_load.json")
    asked = parser.parse_args()
    rng, before = random.Random(0), machine()
    questions: dict[str, None] = {}
    while len(questions) < asked.clients:
        questions[sum_problem(rng, heldout=True).question] = None
    folder = str(model_folder(ROOT / asked.folder).resolve())
    rows: list[dict[str, Any]] = []
    reference: dict[str, str] = {}

    def measure(name: str, url: str, model: str, at_once: bool, times: int) -> None:
        want = (url, model, list(questions), asked.max_tokens, at_once)
        rounds = [asyncio.run(one_round(*want)) for _ in range(times)]
        reference.update(reference or rounds[-1].answers)
        rows.append(summary(name, rounds, reference))
        print(line(rows[-1]), flush=True)

    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    port, n = free_port(), asked.clients
    with running(
        posttrain_serve(str((ROOT / asked.folder).resolve()), port), port, "/ready"
    ) as url:
        name = model_name(asked.folder)
        measure("posttrain serve, one after the other", url, name, False, asked.rounds)
        measure(f"posttrain serve, {n} at once", url, name, True, asked.rounds)
    if importlib.util.find_spec("fastapi") is None:
        raise SystemExit("transformers serve needs fastapi: pip install -e '.[bench]'")
    port = free_port()
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", folder, "--port", str(port)]
    with running(command, port, "/health") as url:
        # Once: by default it generates for one chat after the other, which takes long.
        measure(f"transformers serve, {n} at once", url, folder, True, 1)
    port = free_port()
    command = [*command[:-1], str(port), "--continuous-batching"]
    with running(command, port, "/health") as url:
        name = f"transformers serve --continuous-batching, {n} at once"
        measure(name, url, folder, True, asked.rounds)
    command_line = "python tests/benchmarks/serve_load.py " + " ".join(sys.argv[1:])
    keep(asked.out, command_line.strip(), before, clients=n, max_tokens=asked.max_tokens, rows=rows)
    if rows[1]["errors"]:
        raise SystemExit("posttrain serve made errors")


if __name__ == "__main__":
    main()
