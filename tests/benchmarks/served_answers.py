"""Is the served model the model that was trained? A run, `posttrain deploy`, `posttrain serve`, and
every held-out answer through the real openai client beside the engine's own, greedily.

    python tests/benchmarks/served_answers.py                     # trains `tiny` first
    python tests/benchmarks/served_answers.py --run runs/20260101-120000-quick
    python tests/benchmarks/served_answers.py --config quick --problems 500

Half of the questions are asked one after the other and half 16 at a time: how the server batches
must not change an answer. Exits 1 if any answer differs. Kept in data/results/served_answers.json,
with the seconds of each stage; the deploy stays in runs/served-answers for serve_load.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
from served import KEY, ROOT, free_port, keep, machine, posttrain_serve, running

from course_lib.client import connect
from course_lib.environments import Problem, sums_environment
from course_lib.evaluation import evaluate

PLACE = ROOT / "runs/served-answers"
MAX_TOKENS = 64
AT_ONCE = 16
POSTTRAIN = [sys.executable, "-m", "course_lib.cli"]
seconds: dict[str, float] = {}


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    print(f"{stage} ...", end=" ", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)
    print(f"{seconds[stage]} s", flush=True)


def posttrain(*arguments: str) -> None:
    """Run the command line as a user does; its last words are shown if it fails."""
    done = subprocess.run([*POSTTRAIN, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-2000:])


async def ask(url: str, problems: list[Problem], at_once: int) -> list[str]:
    """The served model's greedy answers, `at_once` in flight."""
    free = asyncio.Semaphore(at_once)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as caller:

        async def one(problem: Problem) -> str:
            async with free:
                answer = await caller.chat.completions.create(
                    model="sums",
                    messages=[{"role": "user", "content": problem.messages[-1].content}],
                    temperature=0,
                    max_tokens=MAX_TOKENS,
                )
                return answer.choices[0].message.content or ""

        return await asyncio.gather(*[one(problem) for problem in problems])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run's folder; none = train one")
    parser.add_argument("--config", default="tiny", help="what to train")
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument(
        "--store", default=None, help="the run's store, if not its own or runs/store"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "data/results/served_answers.json")
    asked, before = parser.parse_args(), machine()
    shutil.rmtree(PLACE, ignore_errors=True)
    run, store = asked.run, asked.store
    if run is None:
        run, store = PLACE / "run", str(PLACE / "store")
        with timed(f"posttrain all --config {asked.config}"):
            posttrain("all", "--config", asked.config, "--out", str(run), "--store", store)
    made = json.loads((run / "report.json").read_text())["checkpoints"]
    at = ["--store", store] if store else []
    with timed("posttrain deploy"):
        posttrain("deploy", "--checkpoint", made["rl"], "--out", str(PLACE / "sums"), *at)

    environment = sums_environment()
    problems = environment.heldout(asked.problems, 0)
    with timed(f"the engine answers {len(problems)} questions"):
        service = connect("embedded", store=store, quiet=True)
        sampler = service.create_sampling_client(model_path=made["rl_sampler"]).result()
        tokenizer = sampler.get_tokenizer()
        engine = evaluate(
            sampler, tokenizer, environment, problems, temperature=0.0, max_tokens=MAX_TOKENS
        )
    ours = [record.completions[0] for record in engine.records]
    port, half = free_port(), len(problems) // 2
    with running(posttrain_serve(str(PLACE / "sums"), port), port, "/ready") as url:
        with timed("posttrain serve answers the first half, one after the other"):
            served = asyncio.run(ask(url, problems[:half], 1))
        with timed(f"posttrain serve answers the second half, {AT_ONCE} at a time"):
            served += asyncio.run(ask(url, problems[half:], AT_ONCE))

    differing = [
        {"question": p.messages[-1].content, "engine": one, "served": other}
        for p, one, other in zip(problems, ours, served, strict=True)
        if one != other
    ]
    grades = [environment.grade(p, text).value for p, text in zip(problems, served, strict=True)]
    accuracy = sum(grade >= 1 for grade in grades) / len(grades)
    same = len(problems) - len(differing)
    print(f"{same} of {len(problems)} answers identical, {len(set(served))} different texts")
    print(f"held-out accuracy, greedy: engine {engine.accuracy:.1%}, served {accuracy:.1%}")
    keep(
        asked.out,
        "python tests/benchmarks/served_answers.py " + " ".join(sys.argv[1:]).strip(),
        before,
        problems=len(problems),
        identical=same,
        accuracy_engine=engine.accuracy,
        accuracy_served=accuracy,
        seconds=seconds,
        differing=differing[:20],
    )
    if differing or accuracy != engine.accuracy:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
