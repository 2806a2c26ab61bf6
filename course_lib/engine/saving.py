"""What does a save or a load do? Weights and optimizer state between a run and the store.

As in `training`, each function puts its work into the run's line and returns the id of its future.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinker import types

from course_lib.engine.external import age_recipients, write_external
from course_lib.engine.models import knows_again
from course_lib.engine.names import TinkerPath, checked_name
from course_lib.engine.records import CheckpointRecord, expiry, iso, now
from course_lib.engine.requests import LoraSpec, RequestError
from course_lib.engine.rooms import Rooms
from course_lib.engine.runs import Model, Run
from course_lib.engine.samplers import SamplingSession
from course_lib.engine.sessions import text_metadata
from course_lib.engine.tensors import (
    ADAPTER,
    OPTIMIZER,
    read_tensors,
    write_adapter,
    write_tensors,
)
from course_lib.engine.training import begin, check_optimizer, new_run, submit, write_record
from course_lib.engine.wire import Reply, json_reply


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
    sampler = SamplingSession(sampler_id, run.owner, run.session_id, run.model, None, key)
    rooms.samplers.add(sampler)
    try:
        rooms.sessions.add_sampler(run.session_id, sampler_id)
    except RequestError:  # its session ended meanwhile: nobody else would free it
        rooms.drop_sampler(sampler)
        raise
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
    run = new_run(rooms, owner, slot, model, message.user_metadata)

    def work() -> Reply:
        begin(rooms, run, LoraSpec(**record.lora))
        try:
            _load(rooms, run, path, record, message.optimizer)
        except Exception:
            rooms.drop_run(run, "its creation failed")
            raise
        return json_reply({"path": str(path), "model_id": run.run_id, "type": "load_weights"})

    return rooms.worker.submit(run.run_id, 0, owner, "create_model", work)


def check_same_model(record: CheckpointRecord, model: Model) -> None:
    """An adapter fits one base model; on another it would load and talk nonsense."""
    if not knows_again(record.fingerprint, model):
        raise RequestError(
            f"{record.path} was trained on another base model than {model.name} is now; start the "
            "engine with the model it was trained on"
        )


def check_same_adapter(record: CheckpointRecord, run: Run) -> None:
    """A run keeps the rank and the matrices that it was made with."""
    own = asdict(run.spec)
    for name in ("rank", "train_mlp", "train_attn", "train_unembed"):
        if record.lora[name] != own[name]:
            raise RequestError(
                f"{record.path} has {name} {record.lora[name]}, this run {own[name]}; "
                "create_training_client_from_state makes a run that fits"
            )


def _load(
    rooms: Rooms, run: Run, path: TinkerPath, record: CheckpointRecord, optimizer: bool
) -> None:
    check_same_model(record, run.model)
    check_same_adapter(record, run)
    if optimizer and path.kind != "weights":
        raise RequestError(f"{path} holds no optimizer state; only weights/ checkpoints do")
    files = (ADAPTER, OPTIMIZER) if optimizer else (ADAPTER,)
    state, *moments = rooms.store.read(
        path, lambda folder: [read_tensors(folder / file, str(path)) for file in files]
    )
    rooms.runs.adapter(run).load_state(state, moments[0] if moments else {})
