"""Is everything in place, and how long will it take? Answers measured on this machine, not guessed.

    posttrain doctor

The estimates come from a few real steps of each preset, through the SDK and the embedded engine, in
a store that is thrown away. Samples of the untrained model run to their full length, so RL's figure
is an upper bound.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.client import choose, connect
from course_lib.config import PRESETS, RunConfig, preset
from course_lib.dotenv import PROJECT, misread_lines, setting
from course_lib.evaluation import evaluate
from course_lib.grpo import train_grpo
from course_lib.rewards import Score
from course_lib.run_data import RunData, load_run_data, planned_steps
from course_lib.sft import train_sft
from course_lib.stages import EVALUATIONS

if TYPE_CHECKING:
    from course_lib.client import CourseService

PACKAGES = ("tinker", "torch", "transformers", "peft", "datasets", "jupyterlab", "modal")
NEEDED_GB = 1.0  # the checkpoints of many runs of the shipped model
PROBE_PROBLEMS = 32


@dataclass(frozen=True)
class PresetTime:
    """Seconds that one step and one judged problem of a preset take here."""

    sft_step_s: float
    rl_step_s: float
    problem_s: float

    def total_s(self, config: RunConfig, conversations: int) -> float:
        """The whole of `posttrain all` with this configuration."""
        steps = planned_steps(config, conversations)
        training = steps["sft"] * self.sft_step_s + steps["rl"] * self.rl_step_s
        return training + EVALUATIONS * config.eval_problems * self.problem_s


def examine(
    backend: str | None = None, model: str | None = None, store: str | Path | None = None
) -> Iterator[str]:
    """The report of `posttrain doctor`, a line at a time, as each thing is found out."""
    yield "Installed"
    yield from (f"  {line}" for line in installed())
    yield "Machine"
    yield from (f"  {line}" for line in machine())
    choice = choose(backend)
    yield "Where the calls go"
    yield f"  {choice.url or choice.backend}, because {choice.reason}"
    yield from (f"  {line}" for line in misread_lines())
    if choice.backend == "hosted":
        yield "  hosted Tinker was not asked: that is for a run that you agreed to"
        return
    if choice.backend == "url":
        service = connect(backend, quiet=True)
        yield f"  it answers, and serves {', '.join(service.models)}"
        return
    place = Path(store or setting("COURSE_STORE") or "runs/store")
    yield f"  checkpoints are kept in {place}, {_room(place)}"
    yield "What a preset takes here (measured on a few steps of each)"
    with tempfile.TemporaryDirectory() as scratch:
        service = connect("embedded", model=model, store=scratch, quiet=True)
        for name in PRESETS:
            config = preset(name)
            data = load_run_data(config)
            times = measure(service, config, data)
            total = times.total_s(config, len(data.train))
            yield (
                f"  {name:<6} {_duration(total):>8}   SFT step {times.sft_step_s:.2f} s, "
                f"RL step up to {times.rl_step_s:.2f} s"
            )
        if service.engine:
            service.engine.stop()


def installed() -> list[str]:
    """Python and the packages that matter, with the pinned version where another is installed."""
    pinned = dict(
        line.split("==")
        for line in (PROJECT / "constraints.txt").read_text(encoding="utf-8").split()
        if line.count("==") == 1
    )
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            lines.append(f"{name} is missing; install it with: pip install -c constraints.txt -e .")
            continue
        tested = pinned.get(name, "")
        note = "" if found.split("+")[0] == tested else f" (tested with {tested})"
        lines.append(f"{name} {found}{note}")
    return lines


def machine() -> list[str]:
    """Processor, memory, accelerator, and the speed of a float32 matrix product."""
    import psutil
    import torch

    memory_gb = psutil.virtual_memory().total / 1e9
    accelerator = "no GPU"
    if torch.cuda.is_available():
        accelerator = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        accelerator = "Apple GPU (MPS)"
    return [
        f"{os.cpu_count()} cores, {memory_gb:.0f} GB memory, {accelerator}",
        f"float32 matrices: {matrix_gflops():.0f} GFLOP/s, threads: {torch.get_num_threads()}",
    ]


def matrix_gflops(size: int = 1024, rounds: int = 5) -> float:
    """The best of a few products of two square matrices, in 10^9 operations per second."""
    import torch

    a, b = torch.rand(size, size), torch.rand(size, size)
    best_s = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * size**3 / best_s / 1e9


def measure(service: CourseService, config: RunConfig, data: RunData) -> PresetTime:
    """Time real steps of this preset; the first of each kind warms up and does not count."""
    client = service.create_lora_training_client(
        service.base_model, rank=config.sft.lora_rank
    ).result()
    tokenizer = client.get_tokenizer()
    sft = replace(config.sft, max_steps=3, save_every=0, eval_every=0)
    sft_rows = train_sft(client, data.train, sft, tokenizer=tokenizer).metrics
    rl = replace(config.rl, steps=2, save_every=0, eval_every=0)
    rl_rows = train_grpo(
        client, data.environment, rl, tokenizer=tokenizer, reward=_any_difference
    ).metrics
    sampler = client.save_weights_and_get_sampling_client().result()
    problems = data.environment.heldout(PROBE_PROBLEMS, 0)
    began = time.monotonic()
    evaluate(sampler, tokenizer, data.environment, problems, max_tokens=rl.max_tokens)
    problem_s = (time.monotonic() - began) / len(problems)
    return PresetTime(sft_rows[-1]["time/total"], rl_rows[-1]["time/total"], problem_s)


def _any_difference(problem: object, completion: str) -> Score:
    """A reward that differs within every group, so that the training half of a step is timed."""
    value = float(len(completion) % 2)
    return Score(value, {}, "only for timing")


def _room(place: Path) -> str:
    """How much a store can hold, and what to do where that is nothing."""
    folder = next(each for each in [place, *place.absolute().parents] if each.exists())
    free_gb = shutil.disk_usage(folder).free / 1e9
    remedy = "name another folder with --store or COURSE_STORE"
    if not os.access(folder, os.W_OK):
        return f"which cannot be written; {remedy}"
    if free_gb < NEEDED_GB:
        return f"{free_gb:.1f} GB free, which is little; free some, or {remedy}"
    return f"{free_gb:.0f} GB free"


def _duration(seconds: float) -> str:
    """
    >>> _duration(42.4), _duration(500)
    ('42 s', '8 min')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
