"""What is there? Everything that the routes work on, made together and closed together."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from course_lib.engine.external import Signer
from course_lib.engine.futures import FutureTable
from course_lib.engine.limits import Limits
from course_lib.engine.names import TinkerPath, parse_path, shown
from course_lib.engine.records import CheckpointRecord, RunRecord
from course_lib.engine.requests import NotFoundError, RequestError
from course_lib.engine.runs import Model, Run, RunTable
from course_lib.engine.samplers import SamplerTable, SamplingSession, Shelf
from course_lib.engine.sessions import Sessions
from course_lib.engine.storage import Store
from course_lib.engine.tensors import Scratch
from course_lib.engine.worker import Worker


@dataclass(frozen=True)
class Compute:
    """The functions that touch torch; tests put a small stand-in here."""

    forward_backward: Callable[..., Any]
    optim_step: Callable[..., dict[str, float]]
    prepare: Callable[..., None]
    sampler: Callable[[Any], Any]
    check_sample: Callable[..., None]


def torch_compute() -> Compute:
    """The real functions, imported only when an engine starts."""
    from course_lib.engine.sampler import Sampler
    from course_lib.engine.trainer import forward_backward, optim_step, prepare
    from course_lib.engine.validation import check_sample

    return Compute(forward_backward, optim_step, prepare, Sampler, check_sample)


@dataclass
class Rooms:
    """The engine without HTTP."""

    models: dict[str, Model]
    store: Store
    compute: Compute
    limits: Limits
    single_owner: bool  # without a keys file one owner sees every run in the store
    scratch: Scratch
    futures: FutureTable
    worker: Worker
    sessions: Sessions
    runs: RunTable
    shelf: Shelf
    samplers: SamplerTable
    signer: Signer
    copies: dict[tuple[str, str], asyncio.Task[str]] = field(default_factory=dict)  # (owner, key)

    @classmethod
    def build(
        cls,
        models: dict[str, Model],
        store: Store,
        compute: Compute,
        limits: Limits | None = None,
        single_owner: bool = True,
    ) -> Rooms:
        limits = limits or Limits()
        scratch, futures = Scratch(store.root), FutureTable(limits)
        return cls(
            models=models,
            store=store,
            compute=compute,
            limits=limits,
            single_owner=single_owner,
            scratch=scratch,
            futures=futures,
            worker=Worker(futures, limits),
            sessions=Sessions(store, limits),
            runs=RunTable(limits, scratch),
            shelf=Shelf(limits, scratch),
            samplers=SamplerTable(compute.sampler),
            signer=Signer(secrets.token_bytes(32)),
        )

    def close(self) -> None:
        """Answer what waits and free the models: whoever still holds an engine holds little."""
        self.worker.stop()
        self.futures.close()
        if not self.worker.alive:
            self.runs.drop_all()
            self.shelf.clear()
            self.samplers.clear()
            self.models.clear()
        self.scratch.close()

    def model(self, name: str) -> Model:
        if name not in self.models:
            raise RequestError(
                f"The base model {shown(name)} is not served here; there is "
                f"{', '.join(self.models)}. More come with `posttrain engine --alias NAME=FOLDER`"
            )
        return self.models[name]

    def may_see(self, owner: str, record: RunRecord | CheckpointRecord) -> bool:
        return self.single_owner or record.owner == owner

    def run_record(self, owner: str, run_id: str) -> RunRecord:
        """The run, when it is this owner's; another owner's is as if it were not there."""
        record = self.store.run(run_id)
        if not self.may_see(owner, record):
            raise NotFoundError(f"There is no training run {run_id} in this store")
        return record

    def checkpoint(
        self, owner: str, path: str, readers: tuple[str, ...] = ()
    ) -> tuple[TinkerPath, CheckpointRecord]:
        """A checkpoint that this owner may read: theirs, a published one, one of `readers`'."""
        parsed = parse_path(path)
        record = self.store.checkpoint(parsed)
        if not (self.may_see(owner, record) or record.public or record.owner in readers):
            raise NotFoundError(f"There is no checkpoint {parsed} in this store")
        return parsed, record

    def drop_run(self, run: Run, reason: str) -> None:
        """Free everything that a run holds, on the compute thread; what waits for it fails."""
        self.worker.close_line(run.run_id, reason)
        self.runs.drop(run)

    def drop_sampler(self, sampler: SamplingSession) -> None:
        """Free everything that a sampler holds; its weights a moment later."""
        self.samplers.drop(sampler)
        self.futures.close_streams(sampler.sampler_id)
        if sampler.weights_key == sampler.sampler_id:  # a snapshot that nobody else uses
            self.worker.errand(lambda: self.shelf.drop(sampler.sampler_id))

    def end_session(self, session_id: str, status: dict[str, Any]) -> None:
        """Finish a session and free what its runs, samplers and results hold."""
        if not self.sessions.end(session_id, status):
            return
        self.futures.end_session(session_id)
        for run in self.runs.of_session(session_id):
            self.worker.close_line(run.run_id, "its session has ended")
            self.worker.errand(lambda run=run: self.runs.drop(run))
            self.worker.errand(lambda run=run: self.shelf.drop(f"inflight:{run.run_id}"))
        for sampler in self.samplers.of_session(session_id):
            self.drop_sampler(sampler)

    def end_silent_sessions(self) -> None:
        for session_id in self.sessions.silent():
            self.end_session(session_id, {"type": "cancelled", "detail": "no heartbeat"})
