"""A training client that only writes down what it was asked: it makes an order judgeable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass
class RecordingClient:
    """Has the two training calls of `tinker.TrainingClient`; `log` is what happened, in order."""

    log: list[str] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    data: list[Any] = field(default_factory=list)

    def forward_backward(self, data: Any, loss_fn: str = "", loss_fn_config: Any = None) -> _Future:
        """Submit the gradient of `data`."""
        self.data.append(data)
        return self._submit(f"forward_backward {loss_fn}".strip(), _Result(f"result of {data}"))

    def optim_step(self, adam_params: Any) -> _Future:
        """Submit one Adam step."""
        if not hasattr(adam_params, "learning_rate"):
            raise TypeError("optim_step takes tinker.AdamParams(learning_rate=...)")
        self.learning_rates.append(adam_params.learning_rate)
        return self._submit("optim_step", _Result("step"))

    def _submit(self, call: str, result: Any) -> _Future:
        self.log.append(f"submit {call}")
        return _Future(self, call, result)


class _Result(str):
    """What was asked for, in words; it has metrics, because a learner may look for the loss."""

    metrics: ClassVar = {"loss:sum": 1.0}


@dataclass
class _Future:
    client: RecordingClient
    call: str
    answer: Any

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the call (here: write down that it was waited for)."""
        self.client.log.append(f"wait {self.call}")
        return self.answer

    def backward(self) -> None:
        """What torch would want here."""
        raise AttributeError("forward_backward has computed the gradient already: no backward()")


def what_happened(returned: Any, arguments: tuple) -> list:
    """What a training step is judged by: the order of calls, the rate, and what came back.

    Asking a future twice is asking once: it keeps its result."""
    client = arguments[0]
    waits = sorted({event for event in client.log if event.startswith("wait")})
    before = client.log[: _first_wait(client.log)]
    submits = [event for event in client.log if event.startswith("submit")]
    return [before, submits, waits, client.learning_rates, returned]


def _first_wait(log: list[str]) -> int:
    return next((i for i, event in enumerate(log) if event.startswith("wait")), len(log))
