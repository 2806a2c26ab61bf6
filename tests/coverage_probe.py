"""Which of the SDK's public methods work against the engine? Calls each one, and writes the table.

    python tests/coverage_probe.py      # writes course_lib/engine/COMPATIBILITY.md

The methods are discovered, not listed: one that a new SDK brings counts as missing until it has a
call here. An `..._async` twin is called with its sync method's arguments.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tinker  # noqa: E402
import torch  # noqa: E402
from tinker import types  # noqa: E402
from tinker.lib.api_future_impl import QueueState  # noqa: E402
from tiny_models import random_tokens, tiny_model, tiny_tokenizer  # noqa: E402

TABLE = ROOT / "course_lib" / "engine" / "COMPATIBILITY.md"
CLASSES = (
    tinker.ServiceClient,
    tinker.TrainingClient,
    tinker.SamplingClient,
    tinker.RestClient,
)
WAIT_S = 30
OUT_OF_SCOPE = {  # matters of hosted accounts: answered at once with a sentence, and not counted
    "get_billing_usage": "no bills here",
    "get_audit_log": "no audit log here",
    "whoami": "a key has no user",
    "assign_session_project": "no projects here",
}


@dataclass(frozen=True)
class Row:
    """One method and what came of it."""

    owner: str
    method: str
    outcome: str  # "works", "not counted: ..." or "fails: ..."


def public_methods(owner: type) -> Iterator[str]:
    """Names of the methods that the SDK defines on the class for its users."""
    for name, member in sorted(vars(owner).items()):
        if not name.startswith("_") and not isinstance(member, property):
            yield name


class Bench:
    """Objects to call the methods on; each call gets names of its own."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url, self.api_key = url, api_key
        self.service = self.new_service()
        self.trainer = self.new_trainer()
        self.rest = tinker.RestClient(base_url=url, api_key=api_key)
        self.state = self.trainer.save_state("probe").result(WAIT_S).path
        self.weights = self.trainer.save_weights_for_sampler("probe").result(WAIT_S).path
        self.external = self.trainer.save_weights_external("probe").result(WAIT_S).path
        self.sampler = self.service.create_sampling_client(base_model="course/base").result(WAIT_S)
        self.session_id = self.service.holder.get_session_id()
        self.sampler_id = f"{self.session_id}:sample:0"
        self.count = 0

    def new_service(self) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=self.api_key)

    def new_trainer(self) -> tinker.TrainingClient:
        future = self.service.create_lora_training_client(base_model="course/base", rank=2, seed=0)
        return future.result(WAIT_S)

    def name(self) -> str:
        self.count += 1
        return f"name-{self.count}"

    def new_state(self) -> str:
        return self.trainer.save_state(self.name()).result(WAIT_S).path


TOKENS = random_tokens(9).tolist()
PROMPT = types.ModelInput.from_ints(TOKENS)
DATA = [
    types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * 8},
    )
]


def custom_loss(data: list, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return -logprobs[0].sum(), {}


def traced_loss(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -logprobs.sum(), {}


def arguments(b: Bench) -> dict[str, Callable[[], tuple[Any, tuple, dict]]]:
    """For each method: the object to call it on, and its arguments."""
    base, adam = {"base_model": "course/base"}, types.AdamParams()
    sampling = types.SamplingParams(max_tokens=2)
    run, s, t, c, r = b.trainer.model_id, b.service, b.trainer, b.sampler, b.rest
    return {
        "ServiceClient.close": lambda: (b.new_service(), ("success",), {}),
        "ServiceClient.copy_weights": lambda: (
            tinker.ServiceClient(base_url=b.url, api_key=b.api_key, project_id="p"),
            (b.weights,),
            {},
        ),
        "ServiceClient.create_custom_loss": lambda: (s, (traced_loss, {"logprobs": 1}), {}),
        "ServiceClient.create_lora_training_client": lambda: (s, (), base | {"rank": 2}),
        "ServiceClient.create_rest_client": lambda: (s, (), {}),
        "ServiceClient.create_sampling_client": lambda: (s, (), base),
        "ServiceClient.create_training_client_from_state": lambda: (s, (b.state,), {}),
        "ServiceClient.create_training_client_from_state_with_optimizer": lambda: (
            s,
            (b.state,),
            {},
        ),
        "ServiceClient.get_console_url": lambda: (s, (), {}),
        "ServiceClient.get_server_capabilities": lambda: (s, (), {}),
        "TrainingClient.create_sampling_client": lambda: (t, (b.weights,), {}),
        "TrainingClient.forward": lambda: (t, (DATA, "cross_entropy"), {}),
        "TrainingClient.forward_backward": lambda: (t, (DATA, "cross_entropy"), {}),
        "TrainingClient.forward_backward_custom": lambda: (t, (DATA, custom_loss), {}),
        "TrainingClient.get_console_url": lambda: (t, (), {}),
        "TrainingClient.get_info": lambda: (t, (), {}),
        "TrainingClient.get_tokenizer": lambda: (t, (), {}),
        "TrainingClient.load_state": lambda: (t, (b.state,), {}),
        "TrainingClient.load_state_with_optimizer": lambda: (t, (b.state,), {}),
        "TrainingClient.optim_step": lambda: (t, (adam,), {}),
        "TrainingClient.save_state": lambda: (t, (b.name(),), {}),
        "TrainingClient.save_weights_and_get_sampling_client": lambda: (t, (), {}),
        "TrainingClient.save_weights_external": lambda: (t, (b.name(),), {}),
        "TrainingClient.save_weights_for_sampler": lambda: (t, (b.name(),), {}),
        **{
            f"{type(target).__name__}.get_telemetry": lambda target=target: (target, (), {})
            for target in (s, t, c, r)
        },
        "SamplingClient.create": lambda: (tinker.SamplingClient, (s.holder,), base),
        "SamplingClient.on_queue_state_change": lambda: (c, (QueueState.ACTIVE, None), {}),
        "SamplingClient.compute_logprobs": lambda: (c, (PROMPT,), {}),
        "SamplingClient.from_sampler_handle": lambda: (
            tinker.SamplingClient,
            (c.get_sampler_handle(),),
            {"api_key": b.api_key},
        ),
        "SamplingClient.get_base_model": lambda: (c, (), {}),
        "SamplingClient.get_sampler_handle": lambda: (c, (), {}),
        "SamplingClient.get_tokenizer": lambda: (c, (), {}),
        "SamplingClient.sample": lambda: (c, (PROMPT, 2, sampling), {}),
        "RestClient.assign_session_project": lambda: (r, (b.session_id, "p"), {}),
        "RestClient.copy_weights": lambda: (r, (b.state, "p"), {}),
        "RestClient.delete_checkpoint": lambda: (
            r,
            (run, b.new_state().split("/", 3)[3]),
            {},
        ),
        "RestClient.delete_checkpoint_from_tinker_path": lambda: (r, (b.new_state(),), {}),
        "RestClient.export_session_trace": lambda: (r, (b.session_id,), {}),
        "RestClient.get_audit_log": lambda: (r, (), {}),
        "RestClient.get_billing_usage": lambda: (r, (str(date.today()), str(date.today())), {}),
        "RestClient.get_current_checkpoint_storage_usage": lambda: (r, (), {}),
        "RestClient.get_external_weights_urls": lambda: (r, (b.external,), {}),
        "RestClient.get_sampler": lambda: (r, (b.sampler_id,), {}),
        "RestClient.get_server_capabilities": lambda: (r, (), {}),
        "RestClient.get_session": lambda: (r, (b.session_id,), {}),
        "RestClient.get_training_run": lambda: (r, (run,), {}),
        "RestClient.get_training_run_by_tinker_path": lambda: (r, (b.state,), {}),
        "RestClient.get_weights_info_by_tinker_path": lambda: (r, (b.state,), {}),
        "RestClient.list_checkpoints": lambda: (r, (run,), {}),
        "RestClient.list_sessions": lambda: (r, (), {}),
        "RestClient.list_training_runs": lambda: (r, (), {}),
        "RestClient.list_user_checkpoints": lambda: (r, (), {}),
        "RestClient.publish_checkpoint_from_tinker_path": lambda: (r, (b.state,), {}),
        "RestClient.search_sessions": lambda: (r, (types.SessionSearchRequest(),), {}),
        "RestClient.set_checkpoint_ttl_from_tinker_path": lambda: (r, (b.state, 3600), {}),
        "RestClient.unpublish_checkpoint_from_tinker_path": lambda: (r, (b.state,), {}),
        "RestClient.whoami": lambda: (r, (), {}),
    }


def call(target: Any, method: str, args: tuple, kwargs: dict) -> None:
    """Call a method and wait for whatever it returns; raises what the user would see."""
    answer = getattr(target, method)(*args, **kwargs)
    if inspect.iscoroutine(answer):
        answer = asyncio.run(asyncio.wait_for(answer, WAIT_S))
    if hasattr(answer, "result"):
        answer.result(WAIT_S)


def outcome(calls: dict[str, Callable], owner: str, method: str) -> str:
    """What came of calling the method."""
    twin = method.removesuffix("_async")
    try:
        target, args, kwargs = calls[f"{owner}.{twin}"]()
        call(target, method, args, kwargs)
    except KeyError:
        return "fails: no call in the probe"
    except Exception as error:
        if twin in OUT_OF_SCOPE:
            return f"not counted: {OUT_OF_SCOPE[twin]}"
        return f"fails: {type(error).__name__}: {error}"[:120]
    return "works"


def probe(url: str, api_key: str) -> list[Row]:
    """Call every public method of the four clients."""
    with warnings.catch_warnings(action="ignore"):  # half of the methods are deprecated
        calls = arguments(Bench(url, api_key))
        return [
            Row(owner.__name__, method, outcome(calls, owner.__name__, method))
            for owner in CLASSES
            for method in public_methods(owner)
        ]


def render(rows: list[Row]) -> str:
    """The table as Markdown."""
    counted = [row for row in rows if not row.outcome.startswith("not counted")]
    working = [row for row in counted if row.outcome == "works"]
    out = [row for row in rows if row not in counted]
    share = 100 * len(working) / len(counted)
    lines = [
        "# What works of the tinker SDK",
        "",
        "Generated by `python tests/coverage_probe.py`, which calls every public method of the "
        f"tinker SDK {version('tinker')} against a running engine.",
        "",
        f"**{len(working)} of {len(counted)} methods work ({share:.0f} %).** "
        f"Not counted: {len(out)} that concern a hosted account (billing usage, audit log, whoami, "
        "project assignment); they answer at once with a sentence.",
    ]
    for owner in dict.fromkeys(row.owner for row in rows):
        lines += ["", f"## {owner}", "", "| method | |", "| --- | --- |"]
        lines += [f"| `{row.method}` | {row.outcome} |" for row in rows if row.owner == owner]
    return "\n".join(lines) + "\n"


def probe_an_engine() -> list[Row]:
    """Probe an engine of our own, with a tiny model."""
    from course_lib.client.tokenizers import teach
    from course_lib.engine.models import load_models
    from course_lib.engine.server import Engine

    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        teach({"course/base": folder})
        engine = Engine(load_models(folder), Path(folder) / "store").launch()
        try:
            return probe(engine.url, engine.api_key)
        finally:
            engine.stop()


if __name__ == "__main__":
    TABLE.write_text(render(probe_an_engine()), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8").splitlines()[4])
