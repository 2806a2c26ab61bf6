"""What one learner trains: the tensors of a LoRA adapter, their gradients and their optimizer.

The tensors live in the layers that peft put into the shared base model; an `Adapter` holds them by
the names they have in an adapter file, so that `state()` can be written to disk and read back by
`peft.PeftModel.from_pretrained`. All of them are views of one array, and so are their gradients:
norm and optimizer go over one array and not over a hundred small ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from course_lib.engine.requests import LoraSpec, RequestError

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for every number, besides its step count

Moment = tuple[str, int]  # an adapter's name, unique on its base model, and its version


class Snapshot(dict[str, Tensor]):
    """An adapter's tensors by name, and the moment they were copied at."""

    def __init__(self, tensors: dict[str, Tensor], moment: Moment) -> None:
        super().__init__(tensors)
        self.moment = moment


class Adapter:
    """One LoRA adapter on a base model: it shares the base weights with others, nothing else."""

    def __init__(
        self,
        name: str,
        spec: LoraSpec,
        parameters: dict[str, nn.Parameter],
        peft_config: dict,
        remove: Callable[[], None],
    ) -> None:
        self.name = name
        self.spec = spec
        self.parameters = parameters  # by their names in an adapter file
        self.peft_config = peft_config  # the content of adapter_config.json
        self.version = 0  # counts every change of the parameters
        self.flat = nn.Parameter(end_to_end(parameters.values()))
        for parameter, part in zip(parameters.values(), self.parts(self.flat), strict=True):
            parameter.data = part
        self.gradients: Tensor | None = None  # summed over forward_backward calls; like `flat`
        self.optimizer = torch.optim.AdamW([self.flat], fused=True)
        self._remove = remove

    def parts(self, flat: Tensor) -> list[Tensor]:
        """An array like `flat`, cut into views of the tensors' shapes."""
        parameters = self.parameters.values()
        parts = flat.detach().split([parameter.numel() for parameter in parameters])
        return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes that this adapter takes: weights, gradients, two Adam moments."""
        return 4 * self.flat.nbytes

    def state(self) -> Snapshot:
        """A copy of the adapter's tensors, on the CPU, by their names in an adapter file."""
        copy = self.parts(self.flat.detach().to("cpu", copy=True))
        return Snapshot(dict(zip(self.parameters, copy, strict=True)), self.moment)

    @property
    def moment(self) -> Moment:
        """Names the tensors as they are now; every change of them makes it another one."""
        return self.name, self.version

    def load_state(
        self, state: dict[str, Tensor], moments: dict[str, Tensor] | None = None
    ) -> None:
        """Take over what `state` and `optimizer_state` gave: all of it, or nothing if one is wrong.

        The next step is then the one that would have come; without moments it is a first one.
        """
        check_tensors(state, {key: p.shape for key, p in self.parameters.items()}, "adapter")
        optimizer = self._joined(moments) if moments else {}
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(state[key])
        self.version += 1
        self.optimizer.state[self.flat] = optimizer
        self.gradients = None  # they belonged to the weights that were replaced

    def optimizer_state(self) -> dict[str, Tensor]:
        """A copy of Adam's moments and step counts, `<tensor>.<field>`; empty before any step."""
        moments: dict[str, Tensor] = {}
        for field, value in self.optimizer.state.get(self.flat, {}).items():
            copy = value.detach().to("cpu", copy=True)
            parts = self.parts(copy) if field in MOMENTS else None
            for index, key in enumerate(self.parameters):
                moments[f"{key}.{field}"] = copy.clone() if parts is None else parts[index]
        return moments

    def _joined(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `optimizer_state` gave, as AdamW keeps it."""
        shapes = {}
        for key, parameter in self.parameters.items():
            shapes |= {f"{key}.exp_avg": parameter.shape, f"{key}.exp_avg_sq": parameter.shape}
            shapes |= {f"{key}.step": torch.Size([])}
        check_tensors(state, shapes, "optimizer")
        steps = {float(state[f"{key}.step"]) for key in self.parameters}
        if len(steps) > 1:
            raise RequestError(f"the tensors in the optimizer state differ in steps: {steps}")
        joined = {
            field: end_to_end([state[f"{key}.{field}"] for key in self.parameters])
            for field in MOMENTS
        }
        device = self.flat.device
        return {
            "step": torch.tensor(steps.pop(), dtype=torch.float32, device=device),
            **{field: value.to(device, torch.float32) for field, value in joined.items()},
        }

    def add_gradients(self) -> bool:
        """Add what backward passes left on the parameters to what is kept for the next step; where
        a number of it is not finite, nothing is added, and the answer is False."""
        parameters = self.parameters.values()
        new = end_to_end([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        least, most = torch.aminmax(new)  # both are NaN where one number is
        if not (math.isfinite(least) and math.isfinite(most)):
            return False
        self.gradients = new if self.gradients is None else self.gradients.add_(new)
        return True

    def delete(self) -> None:
        """Take the adapter out of the base model and free what it holds."""
        self._remove()
        self.parameters, self.gradients = {}, None
        self.flat.data = self.flat.new_empty(0)
        self.optimizer.state.clear()


def end_to_end(tensors: Iterable[Tensor]) -> Tensor:
    """A new array of all their numbers."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def check_tensors(state: dict[str, Tensor], shapes: dict[str, torch.Size], what: str) -> None:
    """Refuse a state that does not fit, naming the first tensor that is wrong."""
    for key, shape in shapes.items():
        if key not in state:
            raise RequestError(f"the {what} state lacks {key}")
        if state[key].shape != shape:
            found, wanted = tuple(state[key].shape), tuple(shape)
            raise RequestError(f"{key} in the {what} state has shape {found}; it must be {wanted}")
    for key in state:
        if key not in shapes:
            raise RequestError(f"the {what} state holds {key}, which this adapter does not have")
