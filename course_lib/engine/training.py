"""What does a training request do? Make a run, train it, save it, load it.

Each function puts one piece of work into the run's line and returns the id of its future. The work
itself runs later, on the compute thread; whatever goes wrong there becomes the future's failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from course_lib.engine.external import age_recipients, write_external
from course_lib.engine.names import TinkerPath, checked_name, run_id_of
from course_lib.engine.protobuf import train_reply, train_request
from course_lib.engine.requests import LoraSpec, RequestError
from course_lib.engine.rooms import Rooms
from course_lib.engine.runs import Model, Run
from course_lib.engine.samplers import SamplingSession
from course_lib.engine.sessions import text_metadata
from course_lib.engine.storage import CheckpointRecord, NotFoundError, RunRecord, expiry, iso, now
from course_lib.engine.tensors import (
    ADAPTER,
    OPTIMIZER,
    read_tensors,
    write_adapter,
    write_tensors,
)
from course_lib.engine.wire import Reply, adam_params, json_reply, loose_ids, lora_spec


def create_model(rooms: Rooms, owner: str, message: types.CreateModelRequest) -> str:
    """A new run with a fresh adapter."""
    check_optimizer(message.optimizer_config)
    run = _new_run(
        rooms,
        owner,
        (message.session_id, message.model_seq_id),
        rooms.model(message.base_model),
        message.user_metadata,
    )

    def work() -> Reply:
        _begin(rooms, run, lora_spec(message.lora_config))
        return json_reply({"model_id": run.run_id, "type": "create_model"})

    return rooms.worker.submit(run.run_id, 0, owner, "create_model", work)


def load_weights(
    rooms: Rooms, owner: str, message: types.LoadWeightsRequest, readers: tuple[str, ...] = ()
) -> str:
    """A checkpoint into a run that exists, or into a new one made for it."""
    if message.session_id is not None and message.model_seq_id is not None:
        return _create_from_checkpoint(rooms, owner, message, readers)
    if message.model_id is None or message.seq_id is None:
        raise RequestError("load_weights needs model_id and seq_id, or session_id and model_seq_id")

    def work(run: Run) -> Reply:
        path, record = rooms.checkpoint(owner, message.path, readers)
        _load(rooms, run, path, record, message.optimizer)
        return json_reply({"path": str(path), "model_id": run.run_id, "type": "load_weights"})

    return submit(rooms, owner, message, "load_weights", work)


def _create_from_checkpoint(
    rooms: Rooms, owner: str, message: types.LoadWeightsRequest, readers: tuple[str, ...]
) -> str:
    check_optimizer(message.optimizer_config)
    path, record = rooms.checkpoint(owner, message.path, readers)
    slot = (message.session_id or "", message.model_seq_id or 0)
    model = rooms.model(message.base_model or record.base_model)
    run = _new_run(rooms, owner, slot, model, message.user_metadata)

    def work() -> Reply:
        _begin(rooms, run, LoraSpec(**record.lora))
        try:
            _load(rooms, run, path, record, message.optimizer)
        except Exception:
            rooms.runs.drop(run)
            raise
        return json_reply({"path": str(path), "model_id": run.run_id, "type": "load_weights"})

    return rooms.worker.submit(run.run_id, 0, owner, "create_model", work)


def _new_run(
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


def _begin(rooms: Rooms, run: Run, spec: LoraSpec) -> None:
    try:
        rooms.runs.create(run, spec)
        write_record(rooms, run)
    except Exception:
        rooms.runs.drop(run)
        raise


def write_record(rooms: Rooms, run: Run) -> None:
    """The run's record, with the time of this request."""
    moment = iso(now())
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
    return rooms.worker.submit(run.run_id, seq_id, owner, what, lambda: work(run))


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
        params = adam_params(message)
        return json_reply({"metrics": rooms.compute.optim_step(rooms.runs.adapter(run), params)})

    return submit(rooms, owner, message, "optim_step", work)


def save_weights(rooms: Rooms, owner: str, message: types.SaveWeightsRequest) -> str:
    """Everything that training needs to go on: the adapter and the optimizer's state."""

    def work(run: Run) -> Reply:
        path = _path(run, "weights", message)
        adapter = rooms.runs.adapter(run)

        def write(folder: Path) -> None:
            write_adapter(folder, adapter.state(), run.peft_config)
            write_tensors(folder / OPTIMIZER, adapter.optimizer_state())

        _save(rooms, run, path, message, write, overwrite=message.overwrite)
        return json_reply({"path": str(path), "type": "save_weights"})

    return submit(rooms, owner, message, "save_weights", work)


def save_weights_for_sampler(
    rooms: Rooms, owner: str, message: types.SaveWeightsForSamplerRequest
) -> str:
    """The adapter alone: by name into the store, without a name as a snapshot for a sampler."""

    def work(run: Run) -> Reply:
        state = rooms.runs.adapter(run).state()
        if message.path is None and message.sampling_session_seq_id is not None:
            sampler_id = _snapshot(rooms, run, message, state)
            return json_reply(
                {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}
            )
        path = _path(run, "sampler_weights", message)
        _save(rooms, run, path, message, lambda to: write_adapter(to, state, run.peft_config))
        return json_reply({"path": str(path), "type": "save_weights_for_sampler"})

    return submit(rooms, owner, message, "save_weights_for_sampler", work)


def _snapshot(
    rooms: Rooms, run: Run, message: types.SaveWeightsForSamplerRequest, state: dict[str, Any]
) -> str:
    sampler_id = f"{run.session_id}:sample:{message.sampling_session_seq_id}"
    key = f"inflight:{run.run_id}" if message.kind == "inflight" else sampler_id
    rooms.shelf.put_snapshot(key, run.model, state)
    rooms.samplers.add(SamplingSession(sampler_id, run.owner, run.session_id, run.model, None, key))
    rooms.sessions.add_sampler(run.session_id, sampler_id)
    return sampler_id


def save_weights_external(
    rooms: Rooms, owner: str, message: types.SaveWeightsExternalRequest
) -> str:
    """The adapter as files to download, encrypted if asked."""

    def work(run: Run) -> Reply:
        path = _path(run, "external_weights", message)
        recipients = age_recipients(message.age_encryption_recipients)
        state = rooms.runs.adapter(run).state()
        record = _save(
            rooms,
            run,
            path,
            message,
            lambda to: write_external(to, state, run.peft_config, recipients),
        )
        return json_reply(
            {
                "path": str(path),
                "size_bytes": record.size_bytes,
                "type": "save_weights_external",
            }
        )

    return submit(rooms, owner, message, "save_weights_external", work)


def _path(run: Run, kind: str, message: Any) -> TinkerPath:
    name = message.path if message.path is not None else f"{message.seq_id:06d}"
    return TinkerPath(run.run_id, kind, checked_name(name))


def _save(
    rooms: Rooms,
    run: Run,
    path: TinkerPath,
    message: Any,
    write: Callable[[Path], None],
    overwrite: bool = False,
) -> CheckpointRecord:
    record = CheckpointRecord(
        path=str(path),
        owner=run.owner,
        base_model=run.model.name,
        fingerprint=run.model.fingerprint,
        lora=asdict(run.spec),
        created_at=iso(now()),
        user_metadata=text_metadata(getattr(message, "user_metadata", None), rooms.limits),
        expires_at=expiry(message.ttl_seconds),
    )
    record = rooms.store.save(path, record, write, overwrite)
    write_record(rooms, run)
    return record


def check_same_model(record: CheckpointRecord, model: Model) -> None:
    """An adapter fits one base model; on another it would load and talk nonsense."""
    if record.fingerprint != model.fingerprint:
        raise RequestError(
            f"{record.path} was trained on another base model than {model.name} is now; start the "
            "engine with the model it was trained on"
        )


def _load(
    rooms: Rooms, run: Run, path: TinkerPath, record: CheckpointRecord, optimizer: bool
) -> None:
    check_same_model(record, run.model)
    folder, moments = rooms.store.folder(path), {}
    state = read_tensors(folder / ADAPTER, str(path))
    if optimizer:
        if path.kind != "weights":
            raise RequestError(f"{path} holds no optimizer state; only weights/ checkpoints do")
        moments = read_tensors(folder / OPTIMIZER, str(path))
    adapter = rooms.runs.adapter(run)
    adapter.load_state(state)
    adapter.load_optimizer_state(moments)
    adapter.gradients = None  # they belonged to the weights that were replaced


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
