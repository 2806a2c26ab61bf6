"""What is kept per training client, and who makes room? The live runs and their adapters.

An adapter that has not been used for the longest time is parked on disk when the live ones together
take more memory than allowed; its next request brings it back. Everything here that touches an
adapter runs on the compute thread.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from course_lib.engine.limits import Limits
from course_lib.engine.names import run_folder
from course_lib.engine.requests import LoraSpec, RequestError
from course_lib.engine.tensors import Scratch


@dataclass
class Model:
    """A base model under one of its names."""

    name: str
    base: Any  # model.BaseModel
    fingerprint: str = ""

    @property
    def tokenizer_id(self) -> str:
        """What the SDK loads the tokenizer by: the folder, which works from any working folder.

        The SDK cuts names at ':', so on a Windows drive only the model's name is left.
        """
        folder = str(self.base.tokenizer_path)
        return self.name if ":" in folder or not folder else folder


@dataclass
class Run:
    """One training run: which adapter on which model, for whom."""

    run_id: str
    owner: str
    session_id: str
    model: Model
    user_metadata: dict[str, str] | None = None
    spec: LoraSpec = field(default_factory=LoraSpec)
    adapter: Any = None  # model.Adapter while it is live
    peft_config: dict[str, Any] = field(default_factory=dict)
    parked: bool = False
    parked_gradients: bool = False  # those that wait for their optim_step
    last_used: int = 0
    noted_at: float = 0.0  # when its record was written, by the monotonic clock

    @property
    def ready(self) -> bool:
        """Whether its creation has succeeded."""
        return self.adapter is not None or self.parked


class RunTable:
    """The runs that clients may train now."""

    def __init__(self, limits: Limits, scratch: Scratch) -> None:
        self._limits, self._scratch = limits, scratch
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._uses = 0

    def add(self, run: Run) -> None:
        with self._lock:
            self._runs[run.run_id] = run

    def get(self, run_id: str) -> Run | None:
        with self._lock:
            return self._runs.get(run_id)

    def of_session(self, session_id: str) -> list[Run]:
        with self._lock:
            return [run for run in self._runs.values() if run.session_id == session_id]

    def create(self, run: Run, spec: LoraSpec) -> Any:
        """Give the run its adapter."""
        adapter = run.model.base.new_adapter(spec)
        run.spec, run.adapter, run.peft_config = spec, adapter, adapter.peft_config
        self._used(run)
        return adapter

    def adapter(self, run: Run) -> Any:
        """The run's adapter, brought back from disk when it was parked."""
        if run.parked:
            self._unpark(run)
        if run.adapter is None:
            raise RequestError("The training run was not created; its creation failed")
        self._used(run)
        return run.adapter

    def drop(self, run: Run) -> None:
        """Free everything the run holds."""
        with self._lock:
            self._runs.pop(run.run_id, None)
        adapter, run.adapter = run.adapter, None
        if adapter is not None:
            adapter.delete()
        if run.parked:
            self._remove_parked(run)

    def drop_all(self) -> None:
        for run in list(self._runs.values()):
            self.drop(run)

    def live_bytes(self) -> int:
        """Memory of all live adapters with gradients and optimizer state."""
        with self._lock:
            return sum(run.adapter.nbytes for run in self._runs.values() if run.adapter is not None)

    def _used(self, run: Run) -> None:
        self._uses += 1
        run.last_used = self._uses
        while self.live_bytes() > self._limits.adapter_bytes:
            with self._lock:
                idle = [
                    other
                    for other in self._runs.values()
                    if other is not run and other.adapter is not None
                ]
            if not idle:
                return
            self._park(min(idle, key=lambda other: other.last_used))

    def _park(self, run: Run) -> None:
        name = run_folder(run.run_id)
        self._scratch.write(f"{name}.adapter", run.adapter.state())
        self._scratch.write(f"{name}.optimizer", run.adapter.optimizer_state())
        if run.adapter.gradients is not None:
            self._scratch.write(f"{name}.gradients", {"gradients": run.adapter.gradients})
        run.parked_gradients = run.adapter.gradients is not None
        run.adapter.delete()
        run.parked = True  # first: at no moment does the run look as if it were not made yet
        run.adapter = None

    def _unpark(self, run: Run) -> None:
        name = run_folder(run.run_id)
        state, moments = (
            self._scratch.read(f"{name}.adapter"),
            self._scratch.read(f"{name}.optimizer"),
        )
        # The seed saves a needless draw: the tensors are overwritten at once.
        adapter = run.model.base.new_adapter(LoraSpec(**{**vars(run.spec), "seed": 0}))
        adapter.load_state(state, moments)
        if run.parked_gradients:  # after `load_state`, which drops what there was
            gradients = self._scratch.read(f"{name}.gradients")["gradients"]
            adapter.gradients = gradients.to(adapter.flat.device)
        run.adapter, run.parked = adapter, False
        self._remove_parked(run)

    def _remove_parked(self, run: Run) -> None:
        name = run_folder(run.run_id)
        self._scratch.remove(f"{name}.adapter")
        self._scratch.remove(f"{name}.optimizer")
        self._scratch.remove(f"{name}.gradients")
