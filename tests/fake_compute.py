"""A stand-in for the engine's compute rooms: no model, the same shapes, every number known.

A fake adapter is one number. A fake forward gives each target the log-probability -token / 100 plus
that number, so that whose weights were used, and how often they were trained, can be read off.
"""

from __future__ import annotations

import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from course_lib.engine.limits import Limits
from course_lib.engine.requests import RequestError, SampledSequence, SampleResult, TrainResult
from course_lib.engine.rooms import Compute
from course_lib.engine.runs import Model
from course_lib.engine.server import Engine

KEY = "base_model.model.layer.lora_A.weight"
POISON = 66  # a token on which the fake trainer fails as a bug would
SLOW = 67  # a token on which it takes `FakeCompute.slow_s`


class FakeAdapter:
    """One number in a tensor; `gradients` counts what optim_step will apply."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.value = torch.zeros(1)
        self.steps = torch.zeros(1)
        self.gradients: torch.Tensor | None = None
        self.deleted = False
        self.peft_config = {"peft_type": "LORA", "r": spec.rank}

    nbytes = 1000

    @property
    def flat(self) -> torch.Tensor:
        return self.value

    def state(self) -> dict[str, torch.Tensor]:
        return {KEY: self.value.clone()}

    def load_state(self, state: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        if set(state) != {KEY} or state[KEY].shape != (1,):
            raise RequestError("the adapter state does not fit")
        self.value = state[KEY].clone()
        self.steps = moments.get("steps", torch.zeros(1)).clone()
        self.gradients = None

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return {"steps": self.steps.clone()}

    def delete(self) -> None:
        self.deleted = True


class FakeBase:
    """What `BaseModel` offers, over the tokens 0 .. 99."""

    def __init__(self) -> None:
        self.context_length, self.vocab_size = 128, 100
        self.config = SimpleNamespace(architectures=["Fake"])
        self.tokenizer_path = tempfile.gettempdir()
        self.adapters: list[FakeAdapter] = []

    def new_adapter(self, spec: Any) -> FakeAdapter:
        if spec.rank < 1:
            raise RequestError(f"rank is {spec.rank}; it must be positive")
        self.adapters.append(FakeAdapter(spec))
        return self.adapters[-1]

    def sampler_weights(self, state: dict[str, torch.Tensor] | None) -> float:
        return 0.0 if state is None else float(state[KEY])


class FakeSampler:
    """Gives each sequence the tokens 1, 2, 3 ...; one token per step for all that are active."""

    def __init__(self, base: FakeBase, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.active: list[tuple[Any, float, Future, int]] = []
        self.batch_sizes: list[int] = []
        self.weights_seen: list[float] = []
        self.broken = False

    def submit(self, request: Any, weights: float) -> Future:
        future: Future = Future()
        self.active.append((request, weights, future, 0))
        self.weights_seen.append(weights)
        return future

    def step(self) -> None:
        if self.broken:
            raise RuntimeError("the decoder broke")
        time.sleep(self.step_s)
        self.batch_sizes.append(len(self.active))
        going = []
        for request, weights, future, made in self.active:
            if request.cancelled():
                future.cancel()
            elif made + 1 >= (request.max_tokens or 1):
                future.set_result(result_of(request, weights))
            else:
                going.append((request, weights, future, made + 1))
        self.active = going

    def reset(self) -> None:
        self.active, self.broken = [], False


def result_of(request: Any, weights: float) -> SampleResult:
    """The whole answer to a request, from its weights' number."""
    count, prompt = request.max_tokens or 1, len(request.prompt)
    tokens = [1 + i % 90 for i in range(count)]
    topk = [[(1, -0.5), (2, -1.5)][: request.topk_sample_logprobs]] * count
    sequence = SampledSequence(
        tokens, [weights - 1.0] * count, "length", topk if request.topk_sample_logprobs else None
    )
    logprobs = np.array([np.nan] + [weights - token / 100 for token in request.prompt[1:]], "f4")
    if request.prompt_logprobs_last_n is not None:
        logprobs[: prompt - request.prompt_logprobs_last_n] = np.nan
    target = request.target_prompt_logprobs
    if target is not None:
        target = np.where(target >= 0, -target / 100, 0.0).astype("f4")
    k, alternatives = request.prompt_alt_tokens_k, None
    if k:
        alternatives = np.full((prompt - 1, k), 7), np.full((prompt - 1, k), -0.7, "f4")
    wide = request.topk_prompt_logprobs
    return SampleResult(
        [sequence] * request.num_samples,
        prompt_logprobs=logprobs if request.prompt_logprobs else None,
        topk_prompt=[[]] + [[(3, -0.3), (4, -0.4)][:wide]] * (prompt - 1) if wide else None,
        target_prompt=target,
        alt_tokens=alternatives,
    )


@dataclass
class FakeCompute:
    """Trains fake adapters and remembers what it was asked, in order."""

    slow_s: float = 0.2
    step_s: float = 0.0
    calls: list[str] = field(default_factory=list)
    samplers: list[FakeSampler] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)  # closed: training waits

    def __post_init__(self) -> None:
        self.gate.set()

    def forward_backward(self, base: FakeBase, adapter: FakeAdapter, request: Any) -> TrainResult:
        self.gate.wait(30)
        first = int(request.data[0].tokens[0])
        self.calls.append(f"forward_backward {first}")
        if first == POISON:
            raise ZeroDivisionError("a bug")
        if first == SLOW:
            time.sleep(self.slow_s)
        if request.loss_fn != "cross_entropy":
            raise RequestError(f"loss_fn {request.loss_fn!r} is not here; there is cross_entropy")
        if not request.forward_only:
            before = torch.zeros(1) if adapter.gradients is None else adapter.gradients
            adapter.gradients = before + len(request.data)
        outputs = []
        for datum in request.data:
            targets = datum.loss_fn_inputs["target_tokens"]
            outputs.append({"logprobs": (float(adapter.value) - targets / 100).astype("f4")})
        return TrainResult(outputs, {"loss:sum": float(len(request.data))})

    def optim_step(self, adapter: FakeAdapter, params: Any) -> dict[str, float]:
        self.calls.append("optim_step")
        if adapter.gradients is not None:
            adapter.value = adapter.value + adapter.gradients
        adapter.steps = adapter.steps + 1
        adapter.gradients = None
        return {"grad_norm:mean": float(adapter.value), "steps:max": float(adapter.steps)}

    def prepare(self, base: FakeBase, adapter: FakeAdapter) -> None:
        self.calls.append("prepare")

    def make_sampler(self, base: FakeBase) -> FakeSampler:
        self.samplers.append(FakeSampler(base, self.step_s))
        return self.samplers[-1]

    def rooms(self) -> Compute:
        from course_lib.engine.validation import check_sample

        return Compute(
            self.forward_backward, self.optim_step, self.prepare, self.make_sampler, check_sample
        )


def fake_models(*names: str) -> dict[str, Model]:
    base = FakeBase()
    return {name: Model(name, base, "fake") for name in names or ("course/base",)}


def fake_engine(
    store: Path, compute: FakeCompute | None = None, limits: Limits | None = None, **options: Any
) -> Engine:
    """A launched engine over the stand-in; the caller stops it."""
    compute = compute or FakeCompute()
    models = options.pop("models", None) or fake_models()
    return Engine(models, store, compute=compute.rooms(), limits=limits, **options).launch()
