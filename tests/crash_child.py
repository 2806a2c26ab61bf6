"""Kill an engine with SIGKILL at random moments, many times, and look at what is left.

    python tests/crash_child.py STORE MODEL ROUNDS SEED

Everything heavy is imported and loaded once; each round forks a child that runs an engine and the
SDK: it trains, saves (replacing earlier checkpoints, too) and samples, and notes every save that
the engine acknowledged. The parent kills it after a random time and checks the store. Prints one
JSON line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0", "OMP_NUM_THREADS": "1"}

import tinker  # noqa: E402
from tinker import types  # noqa: E402

from course_lib.engine.models import load_models  # noqa: E402
from course_lib.engine.names import KINDS, parse_path  # noqa: E402
from course_lib.engine.server import Engine  # noqa: E402
from course_lib.engine.storage import Store  # noqa: E402
from course_lib.engine.tensors import ADAPTER, OPTIMIZER, read_tensors  # noqa: E402

WAIT_S = 60
DATA = [
    types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
    )
]


class Notebook:
    """Lines that are on disk when `note` returns."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stream = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, **line: object) -> None:
        os.write(self.stream, json.dumps(line).encode() + b"\n")
        os.fsync(self.stream)


def child(models: dict, store: Path, acks: Path, resume: str | None) -> None:
    """Train, save and sample until killed."""
    notes = Notebook(acks)
    engine = Engine(models, store).launch()
    service = tinker.ServiceClient(base_url=engine.url, api_key=engine.api_key)
    if resume is None:
        future = service.create_lora_training_client(base_model="course/base", rank=4, seed=0)
    else:
        future = service.create_training_client_from_state_with_optimizer(resume)
    client = future.result(WAIT_S)
    notes.note(ready=True)
    params, prompt = types.SamplingParams(max_tokens=8, stop=[]), types.ModelInput.from_ints([1])
    for step in range(10_000):
        client.forward_backward(DATA, "cross_entropy")
        client.optim_step(types.AdamParams())
        metadata = {"step": str(step)}
        name = f"state-{step % 3}"  # replaces an earlier one from the fourth on
        saved = client.save_state(name, overwrite=True, user_metadata=metadata)
        notes.note(path=saved.result(WAIT_S).path, step=step)
        saved = client.save_weights_for_sampler(f"sampler-{step}", user_metadata=metadata)
        notes.note(path=saved.result(WAIT_S).path, step=step)
        sampler = client.save_weights_and_get_sampling_client().result(WAIT_S)
        sampler.sample(prompt, 2, params).result(WAIT_S)


def acknowledged(acks: Path) -> dict[str, int]:
    """Path -> the last step whose save was acknowledged."""
    lines = [json.loads(line) for line in acks.read_text().splitlines()]
    return {line["path"]: line["step"] for line in lines if "path" in line}


def faults(store: Store, expected: dict[str, int]) -> list[str]:
    """What is wrong with the store: acknowledged saves that are lost, or visible ones not whole."""
    found = []
    for path, step in expected.items():
        try:
            record = store.checkpoint(parse_path(path))
            if int(record.user_metadata["step"]) < step:
                found.append(
                    f"{path}: step {step} was acknowledged, {record.user_metadata} is there"
                )
        except Exception as error:
            found.append(f"{path}: acknowledged at step {step}, but {error}")
    for run_id in {parse_path(path).run_id for path in expected}:
        for record in store.checkpoints(run_id):
            path = parse_path(record.path)
            assert path.kind in KINDS
            try:
                read_tensors(store.folder(path) / ADAPTER, record.path)
                if path.kind == "weights":
                    read_tensors(store.folder(path) / OPTIMIZER, record.path)
            except Exception as error:
                found.append(f"{record.path}: visible, but {error}")
    return found


def kill_one(
    models: dict, store: Path, acks: Path, resume: str | None, lines: int, delay_s: float
) -> None:
    """Start a child and kill it `delay_s` after its notes have so many lines."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            child(models, store, acks, resume)
        finally:
            os._exit(1)
    started = time.monotonic()
    while lines and (not acks.exists() or acks.read_bytes().count(b"\n") < lines):
        assert time.monotonic() - started < WAIT_S, "the child does not get on"
        time.sleep(0.002)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main(place: str, model: str, rounds: int, seed: int) -> None:
    rng, store, models = random.Random(seed), Store(place), load_models(model)
    everything: dict[str, int] = {}
    found: list[str] = []
    resume, resumed = None, 0
    for number in range(rounds):
        acks = Path(place) / f"acks-{number}"
        kill_one(models, Path(place), acks, resume, rng.randint(0, 8), rng.uniform(0, 0.3))
        saves = acknowledged(acks) if acks.exists() else {}
        found += faults(store, saves)
        everything |= saves
        states = [path for path in saves if "/weights/" in path]
        resumed += bool(resume and saves)
        resume = rng.choice(states) if states else resume
    found += faults(store, everything)
    left = [p.name for p in (Path(place) / "scratch").iterdir()]
    Engine(models, place)  # the next start sweeps what was parked
    kept = len(list((Path(place) / "scratch").iterdir()))
    print(
        json.dumps(
            {
                "rounds": rounds,
                "acknowledged": len(everything),
                "resumed": resumed,
                "faults": found,
                "scratch_left": len(left),
                "scratch_after_start": kept,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
