"""A language model of one table, behind the SDK's client methods: real losses, real gradients, no
server.

The next token depends on the last one only: logprobs = log_softmax(table[last]). Small enough to
compute every expectation exactly, and it learns, so that the loops can be run for real in
milliseconds.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import tinker
import torch

from course_lib.losses import LOSSES


class Done:
    """A future that is there already; awaiting it is noted in `calls`."""

    def __init__(self, value: Any, calls: list[str] | None = None) -> None:
        self.value, self.calls = value, calls

    def result(self) -> Any:
        if self.calls is not None:
            self.calls.append("await")
        return self.value


class ToyPolicy:
    """What `train_sft` and `train_grpo` need of a `tinker.TrainingClient`, in call order in
    `calls`.
    """

    def __init__(self, vocabulary: int, seed: int = 0, scale: float = 0.5) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.table = (
            torch.randn(vocabulary, vocabulary, generator=draw, dtype=torch.float64) * scale
        )
        self.table.requires_grad_(True)
        self.adam = torch.optim.Adam([self.table], lr=1.0, betas=(0.9, 0.95), eps=1e-12)
        self.calls: list[str] = []
        self.trained_on: list[tuple[list[tinker.Datum], Any]] = []  # with the loss's settings
        self.saved: dict[str, Any] = {}

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Row i: the distribution of the token after tokens[i]."""
        return torch.log_softmax(self.table[torch.tensor(tokens)], dim=-1)

    def forward(self, data: list[tinker.Datum], loss_fn: str) -> Done:
        with torch.no_grad():
            return Done(self._loss(data, loss_fn, {})[1])

    def forward_backward(
        self, data: list[tinker.Datum], loss_fn: str, loss_fn_config: Any = None
    ) -> Done:
        self.calls.append("forward_backward")
        self.trained_on.append((data, loss_fn_config))
        loss, result = self._loss(data, loss_fn, loss_fn_config or {})
        loss.backward()
        return Done(result, self.calls)

    def forward_backward_custom(self, data: list[tinker.Datum], loss_fn: Any) -> Done:
        self.calls.append("forward_backward_custom")
        loss, metrics = loss_fn(data, [self._target_logprobs(datum) for datum in data])
        loss.backward()
        return Done(SimpleNamespace(metrics={**metrics, "loss:sum": float(loss.detach())}))

    def optim_step(self, adam: tinker.AdamParams) -> Done:
        self.calls.append("optim_step")
        self.adam.param_groups[0]["lr"] = adam.learning_rate
        norm = float(self.table.grad.norm()) if self.table.grad is not None else 0.0
        self.adam.step()
        self.adam.zero_grad()
        return Done(SimpleNamespace(metrics={"grad_norm:mean": norm}), self.calls)

    def save_state(self, name: str) -> Done:
        path = f"tinker://toy/weights/{name}"
        self.saved[path] = copy.deepcopy((self.table.detach(), self.adam.state_dict()))
        return Done(SimpleNamespace(path=path))

    def save_weights_for_sampler(self, name: str) -> Done:
        path = f"tinker://toy/sampler_weights/{name}"
        self.saved[path] = self.table.detach().clone()
        return Done(SimpleNamespace(path=path))

    def restore(self, path: str) -> ToyPolicy:
        """A new client with saved weights and optimizer, as after a restart."""
        table, adam = copy.deepcopy(self.saved[path])
        other = ToyPolicy(len(table))
        other.table.data, other.saved = table, self.saved
        other.adam.load_state_dict(adam)
        return other

    def save_weights_and_get_sampling_client(self) -> Done:
        self.calls.append("sampler")
        return Done(ToySampler(self.table.detach().clone()))

    def create_sampling_client(self, path: str) -> Done:
        return Done(ToySampler(self.saved[path]))

    def _target_logprobs(self, datum: tinker.Datum) -> torch.Tensor:
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].data)
        rows = self.logprobs(datum.model_input.to_ints())
        return rows.gather(1, targets[:, None])[:, 0]

    def _loss(self, data: list[tinker.Datum], loss_fn: str, config: Any) -> tuple[Any, Any]:
        total, outputs = torch.zeros((), dtype=torch.float64), []
        for datum in data:
            target_logprobs = self._target_logprobs(datum)
            inputs = {
                name: torch.tensor(values.data, dtype=torch.float64)
                for name, values in datum.loss_fn_inputs.items()
            }
            total = total + LOSSES[loss_fn](target_logprobs, inputs, config).sum()
            outputs.append({"logprobs": SimpleNamespace(data=target_logprobs.tolist())})
        metrics = {"loss:sum": float(total.detach())}
        return total, SimpleNamespace(loss_fn_outputs=outputs, metrics=metrics)


class ToySampler:
    """A frozen table to sample from; seeded calls repeat."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def sample(
        self, prompt: tinker.ModelInput, num_samples: int, sampling_params: tinker.SamplingParams
    ) -> Done:
        params = sampling_params
        sequences = []
        for index in range(num_samples):
            draw = torch.Generator().manual_seed((params.seed or 0) + index)
            last, tokens, logprobs = prompt.to_ints()[-1], [], []
            while len(tokens) < params.max_tokens and (not tokens or last not in params.stop):
                scaled = self.table[last] / (params.temperature or 1.0)
                chances = torch.softmax(scaled, dim=-1)
                greedy = params.temperature == 0
                pick = chances.argmax() if greedy else torch.multinomial(chances, 1, generator=draw)
                last = int(pick)
                tokens.append(last)
                logprobs.append(math.log(float(chances[last])))
            reason = "stop" if last in params.stop else "length"
            sequences.append(SimpleNamespace(tokens=tokens, logprobs=logprobs, stop_reason=reason))
        return Done(SimpleNamespace(sequences=sequences))

    def compute_logprobs(self, prompt: tinker.ModelInput) -> Done:
        tokens = prompt.to_ints()
        rows = torch.log_softmax(self.table[torch.tensor(tokens[:-1])], dim=-1)
        return Done([None, *rows.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()])
