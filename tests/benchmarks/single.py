"""Rows without a duel of two trainers: the first token, the price of HTTP, growth, the queue."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from duel import Contender, run
from models import PROJECT, SHIPPED
from ours import COUNTS, LENGTHS
from rows import DUELS, OURS, SMALL_SFT

OURS_FIRST = """
import time; began = time.perf_counter()
import tinker
import_s = time.perf_counter() - began
import tempfile
from course_lib import connect
service = connect("embedded", store=tempfile.mkdtemp(prefix="bench-store-"), quiet=True)
client = service.create_sampling_client(base_model=service.base_model).result()
prompt = client.get_tokenizer()("<|user|>What is 23 + 45 + 61?<|end|><|assistant|>")["input_ids"]
params = tinker.SamplingParams(max_tokens=1)
client.sample(tinker.ModelInput.from_ints(prompt), 1, params).result()
"""
PEER_FIRST = """
import time; began = time.perf_counter()
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("<|user|>What is 23 + 45 + 61?<|end|><|assistant|>", return_tensors="pt")
model.generate(**inputs, max_new_tokens=1)
"""
REPORT = """
import json, os, sys
print(json.dumps({"seconds": time.perf_counter() - began, "import_s": globals().get("import_s")}))
sys.stdout.flush(); os._exit(0)
"""


def in_new_process(code: str) -> dict[str, Any]:
    """Run a program that ends with REPORT; what it reported."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(done.stderr.strip()[-600:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def first_token(rounds: int, budget_s: float) -> dict[str, Any]:
    """From `import tinker` to the first sampled token, each time in a new process."""
    peer = PEER_FIRST.format(folder=str(SHIPPED))
    both = [(in_new_process(OURS_FIRST), in_new_process(peer)) for _ in range(rounds + 1)][1:]
    return {
        "sides": {
            "ours": {"rounds_s": [ours["seconds"] for ours, _ in both]},
            "transformers": {"rounds_s": [theirs["seconds"] for _, theirs in both]},
        },
        "import_tinker_s": statistics.median(ours["import_s"] for ours, _ in both),
    }


def sdk(rounds: int, budget_s: float) -> dict[str, Any]:
    """The SFT step through SDK and HTTP, and the engine's functions called directly."""
    options = {"model": "0.9M", "batch": SMALL_SFT["batch"], "shape": SMALL_SFT["shape"]}
    sides = [
        Contender("ours", "ours:sft", options, 11),
        Contender("functions called directly", "ours:direct", options, 11),
    ]
    run(sides, rounds, 5, budget_s)
    cost = [a - b for a, b in zip(sides[0].rounds, sides[1].rounds, strict=True)]
    return {
        "sides": {
            each.name: {"rounds_s": each.rounds, "peak_mib": round(each.peak_mib)} for each in sides
        },
        "cost_s": cost,
    }


def idle(rounds: int, budget_s: float) -> dict[str, Any]:
    """Steps and samples of the shipped model where the engine computes nothing."""
    sides = []
    for name in ("sft_shipped", "grpo_shipped", "sample_shipped"):
        row = DUELS[name]
        work = row.sides[OURS][0].partition(":")[2]
        sides.append(Contender(name, "ours:idle", row.options | {"work": work}, 7))
    run(sides, rounds, 5, budget_s)
    return {"sides": {each.name: {"rounds_s": each.rounds} for each in sides}}


def growth(rounds: int, budget_s: float) -> dict[str, Any]:
    """Step time against tokens: longer rows up to the context, and more rows."""
    shapes = [*LENGTHS, *COUNTS]
    side = Contender("ours", "ours:growth", {"model": "0.9M", "shapes": shapes})
    run([side], rounds, 1, budget_s)
    points = side.facts["points"]
    by_length, by_count = points[: len(LENGTHS)], points[len(LENGTHS) :]
    return {"by_length": by_length, "by_count": by_count, "exponent": exponent(by_length)}


def exponent(points: list[list[float]]) -> float:
    """The slope of log seconds over log tokens: 1 is linear, 2 is quadratic."""
    import numpy as np

    tokens = [rows * length for rows, length, _ in points]
    slope, _ = np.polyfit(np.log(tokens), np.log([seconds for *_, seconds in points]), 1)
    return float(slope)


def memory(rounds: int, budget_s: float) -> dict[str, Any]:
    """Peak memory with 8 and with 40 steps of 8,192 tokens in the queue."""
    peaks = {}
    for requests in (8, 40):
        side = Contender("ours", "ours:queue", {"model": "0.9M", "requests": requests})
        run([side], 1, 0, budget_s)
        peaks[str(requests)] = round(side.peak_mib)
    return {"peak_mib": peaks}


ROWS = {"first_token": first_token, "sdk": sdk, "idle": idle, "growth": growth, "memory": memory}


def measure(name: str, rounds: int, budget_s: float) -> dict[str, Any]:
    return ROWS[name](rounds, budget_s)
