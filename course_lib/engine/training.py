"""What does a training request do? Make a run, compute a step in it.

Each function puts one piece of work into the run's line and returns the id of its future. The work
itself runs later, on the compute thread; whatever goes wrong there becomes the future's failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from course_lib.engine.answers import tried
from course_lib.engine.names import run_id_of
from course_lib.engine.protobuf import train_reply, train_request
from course_lib.engine.records import RunRecord, iso, now
from course_lib.engine.requests import LoraSpec, NotFoundError, RequestError
from course_lib.engine.rooms import Rooms
from course_lib.engine.runs import Model, Run
from course_lib.engine.sessions import text_metadata
from course_lib.engine.wire import Reply, adam_params, json_reply, loose_ids, lora_spec


def create_model(rooms: Rooms, owner: str, message: types.CreateModelRequest) -> str:
    """A new run with a fresh adapter."""
    check_optimizer(message.optimizer_config)
    run = new_run(
        rooms,
        owner,
        (message.session_id, message.model_seq_id),
        rooms.model(message.base_model),
        message.user_metadata,
    )

    def work() -> Reply:
        begin(rooms, run, lora_spec(message.lora_config))
        return json_reply({"model_id": run.run_id, "type": "create_model"})

    return rooms.worker.submit(run.run_id, 0, owner, "create_model", work)


def new_run(
    rooms: Rooms,
    owner: str,
    slot: tuple[str, int],
    model: Model,
    metadata: dict[str, Any] | None,
) -> Run:
    """Register the run that the client derives from (session, model sequence id)."""
    session = rooms.sessions.live(slot[0], owner)
    run_id = run_id_of(session.session_id, slot[1])
    existing = rooms.runs.get(run_id)
    if existing is not None:
        return existing
    run = Run(run_id, owner, session.session_id, model, text_metadata(metadata, rooms.limits))
    rooms.runs.add(run)
    rooms.worker.open_line(run_id, session.session_id)
    rooms.sessions.add_run(session.session_id, run_id)
    return run


def begin(rooms: Rooms, run: Run, spec: LoraSpec) -> None:
    claimed = False
    try:
        claimed = rooms.store.claim_run(run.run_id)
        if not claimed:
            raise RequestError(f"{run.run_id} is taken by a copy; use a model_seq_id that is free")
        rooms.runs.create(run, spec)
        write_record(rooms, run)
    except Exception:
        rooms.drop_run(run, "its creation failed")
        if claimed:
            rooms.store.unclaim_run(run.run_id)
        raise


def write_record(rooms: Rooms, run: Run) -> None:
    """The run's record, with the time of this request."""
    moment, run.noted_at = iso(now()), time.monotonic()
    try:
        created = rooms.store.run(run.run_id).created_at
    except NotFoundError:
        created = moment
    rooms.store.write_run(
        RunRecord(
            run_id=run.run_id,
            owner=run.owner,
            session_id=run.session_id,
            base_model=run.model.name,
            fingerprint=run.model.fingerprint,
            lora=asdict(run.spec),
            created_at=created,
            last_request_at=moment,
            user_metadata=run.user_metadata,
        )
    )


def note_request(rooms: Rooms, run: Run) -> None:
    """Keep the time of the run's last request, to the minute: each write waits for the disk."""
    if run.ready and time.monotonic() >= run.noted_at + rooms.limits.note_s:
        write_record(rooms, run)


def check_optimizer(config: Any) -> None:
    if config is not None and config.type != "adamw":
        raise RequestError(f"The optimizer {config.type!r} is unknown here; there is adamw")


def owned_run(rooms: Rooms, owner: str, run_id: str) -> Run | None:
    run = rooms.runs.get(run_id)
    return run if run is not None and run.owner == owner else None


def submit(rooms: Rooms, owner: str, message: Any, what: str, work: Callable[[Run], Reply]) -> str:
    """Put the work into the run's line; it is refused only by a failed future."""
    run, seq_id = owned_run(rooms, owner, message.model_id), message.seq_id
    if run is None or seq_id is None or seq_id < 1:

        def refuse() -> Reply:
            if run is None:
                raise NotFoundError(
                    "The training run is unknown here; its session or the engine that held it has "
                    "ended. create_training_client_from_state goes on from a checkpoint"
                )
            raise RequestError(f"seq_id is {seq_id}; training requests are numbered from 1")

        return rooms.worker.fail(owner, refuse)

    def noted() -> Reply:
        tried(lambda: note_request(rooms, run))
        return work(run)

    return rooms.worker.submit(run.run_id, seq_id, owner, what, noted)


def refuse(rooms: Rooms, owner: str, body: bytes, error: RequestError) -> str:
    """Answer a training request that cannot be read with a failed future in its place in the line.

    A 4xx would leave a hole there: the client has counted its sequence id.
    """
    ids = loose_ids(body)
    if ids is None:
        raise error

    def work(run: Run) -> Reply:
        raise error

    return submit(rooms, owner, SimpleNamespace(model_id=ids[0], seq_id=ids[1]), "refused", work)


def forward_backward(rooms: Rooms, owner: str, message: pb.ForwardBackwardRequest) -> str:
    """One chunk of data: log-probabilities, loss and (unless forward only) gradients."""

    def work(run: Run) -> Reply:
        request = train_request(message, rooms.limits)
        adapter = rooms.runs.adapter(run)
        return train_reply(rooms.compute.forward_backward(run.model.base, adapter, request))

    return submit(rooms, owner, message, "forward_backward", work)


def optim_step(rooms: Rooms, owner: str, message: types.OptimStepRequest) -> str:
    """One optimizer step with the gradients gathered since the last one."""

    def work(run: Run) -> Reply:
        adapter = rooms.runs.adapter(run)
        metrics = rooms.compute.optim_step(adapter, adam_params(message))
        # Whatever comes next, samples or a step, needs the new weights.
        rooms.worker.if_idle(lambda: rooms.compute.prepare(run.model.base, adapter))
        return json_reply({"metrics": metrics})

    return submit(rooms, owner, message, "optim_step", work)


def get_info(rooms: Rooms, owner: str, run_id: str) -> dict[str, Any]:
    """What a `TrainingClient` asks once, when it is made."""
    run = owned_run(rooms, owner, run_id)
    if run is None or not run.ready:
        raise NotFoundError(f"There is no training run {run_id!r} in this engine")
    base = run.model.base
    architectures = getattr(base.config, "architectures", None) or [type(base.config).__name__]
    return {
        "type": "get_info",
        "model_id": run.run_id,
        "model_data": {
            "arch": architectures[0],
            "model_name": run.model.name,
            "tokenizer_id": run.model.tokenizer_id,
        },
        "is_lora": True,
        "lora_rank": run.spec.rank,
        "model_name": run.model.name,
        "optimizer_config": {"type": "adamw"},
    }
