"""What can be asked about what was made? Listing, publishing, expiry, deletion, copies."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinker import types

from course_lib.engine.names import KINDS, TinkerPath, checked_run_id, parse_path, run_id_of
from course_lib.engine.records import CheckpointRecord, RunRecord, expiry, iso, now
from course_lib.engine.requests import NotFoundError, RequestError
from course_lib.engine.rooms import Rooms
from course_lib.engine.sessions import Sessions
from course_lib.engine.storage import RECORD


def page(items: list[Any], limit: int, offset: int) -> tuple[list[Any], dict[str, int]]:
    """One page and the cursor that describes it."""
    cursor = {"offset": offset, "limit": limit, "total_count": len(items)}
    return items[offset : offset + limit], cursor


def checkpoint_json(record: CheckpointRecord) -> dict[str, Any]:
    path = parse_path(record.path)
    return {
        "checkpoint_id": path.checkpoint_id,
        "checkpoint_type": KINDS[path.kind],
        "time": record.created_at,
        "tinker_path": record.path,
        "size_bytes": record.size_bytes,
        "public": record.public,
        "user_metadata": record.user_metadata,
        "expires_at": record.expires_at,
    }


def run_json(rooms: Rooms, record: RunRecord) -> dict[str, Any]:
    newest: dict[str, dict[str, Any]] = {}
    for checkpoint in rooms.store.checkpoints(record.run_id):
        newest.setdefault(parse_path(checkpoint.path).kind, checkpoint_json(checkpoint))
    return {
        "training_run_id": record.run_id,
        "base_model": record.base_model,
        "model_owner": record.owner,
        "is_lora": True,
        "lora_rank": record.lora["rank"],
        "last_request_time": record.last_request_at,
        "last_checkpoint": newest.get("weights"),
        "last_sampler_checkpoint": newest.get("sampler_weights"),
        "user_metadata": record.user_metadata,
    }


def visible_runs(rooms: Rooms, owner: str, project_id: str | None = None) -> list[RunRecord]:
    """The owner's runs, the one used last first."""
    runs = [run for run in rooms.store.runs() if rooms.may_see(owner, run)]
    if project_id is None:
        return runs
    inside = {s.session_id for s in rooms.store.sessions() if s.project_id == project_id}
    return [run for run in runs if run.session_id in inside]


def training_runs(
    rooms: Rooms, owner: str, limit: int, offset: int, project_id: str | None
) -> dict[str, Any]:
    runs, cursor = page(visible_runs(rooms, owner, project_id), limit, offset)
    return {"training_runs": [run_json(rooms, run) for run in runs], "cursor": cursor}


def training_run(rooms: Rooms, owner: str, run_id: str) -> dict[str, Any]:
    return run_json(rooms, rooms.run_record(owner, checked_run_id(run_id)))


def run_checkpoints(rooms: Rooms, owner: str, run_id: str) -> dict[str, Any]:
    rooms.run_record(owner, checked_run_id(run_id))
    return {"checkpoints": [checkpoint_json(c) for c in rooms.store.checkpoints(run_id)]}


def all_checkpoints(rooms: Rooms, owner: str, limit: int, offset: int) -> dict[str, Any]:
    records = [
        checkpoint
        for run in visible_runs(rooms, owner)
        for checkpoint in rooms.store.checkpoints(run.run_id)
    ]
    records.sort(key=lambda record: record.created_at, reverse=True)
    found, cursor = page(records, limit, offset)
    return {"checkpoints": [checkpoint_json(c) for c in found], "cursor": cursor}


def own_checkpoint(rooms: Rooms, owner: str, path: TinkerPath) -> CheckpointRecord:
    """The checkpoint, when this owner may change it (reading a published one is not enough)."""
    record = rooms.store.checkpoint(path)
    if not rooms.may_see(owner, record):
        raise NotFoundError(f"There is no checkpoint {path} in this store")
    return record


def delete_checkpoint(rooms: Rooms, owner: str, path: TinkerPath) -> None:
    own_checkpoint(rooms, owner, path)
    rooms.store.delete(path)


def publish(rooms: Rooms, owner: str, path: TinkerPath, public: bool) -> None:
    own_checkpoint(rooms, owner, path)
    rooms.store.update(path, public=public)


def set_ttl(rooms: Rooms, owner: str, path: TinkerPath, ttl_seconds: int | None) -> None:
    own_checkpoint(rooms, owner, path)
    rooms.store.update(path, expires_at=expiry(ttl_seconds))


def weights_info(
    rooms: Rooms, owner: str, path: str, readers: tuple[str, ...] = ()
) -> dict[str, Any]:
    _, record = rooms.checkpoint(owner, path, readers)
    flags = {name: record.lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
    return {
        "base_model": record.base_model,
        "is_lora": True,
        "lora_rank": record.lora["rank"],
        "optimizer_config": {"type": "adamw"},
        **flags,
    }


def download_urls(rooms: Rooms, owner: str, path: TinkerPath, base_url: str) -> dict[str, Any]:
    rooms.checkpoint(owner, str(path))
    if path.kind != "external_weights":
        raise RequestError(f"{path} is not for download; save_weights_external makes one that is")
    files = [file for file in rooms.store.folder(path).iterdir() if file.name != RECORD]
    urls = {
        file.name: rooms.signer.url(base_url, f"{place_of(path)}/{file.name}")
        for file in sorted(files)
    }
    return {"urls": urls, "expires": rooms.signer.expires()}


def place_of(path: TinkerPath) -> str:
    return str(path).removeprefix("tinker://")


def download(rooms: Rooms, path: TinkerPath, file: str, expires: str, token: str) -> Path:
    """The file behind a signed URL."""
    rooms.signer.check(f"{place_of(path)}/{file}", expires, token)
    rooms.store.checkpoint(path)
    names = {entry.name: entry for entry in rooms.store.folder(path).iterdir()}
    if file not in names or names[file].is_symlink() or file == RECORD:
        raise NotFoundError(f"{path} has no file {file!r}")
    return names[file]


def copy_weights(
    rooms: Rooms, owner: str, message: types.CopyWeightsRequest, readers: tuple[str, ...] = ()
) -> str:
    """A copy of a checkpoint in a run of its own, which cannot be trained."""
    source, record = rooms.checkpoint(owner, message.source_path, readers)
    moment, expires_at = iso(now()), expiry(message.ttl_seconds)
    session_id, run_id = _slot(rooms, owner, message)
    path = TinkerPath(run_id, source.kind, source.name)
    copy = replace(
        record,
        path=str(path),
        owner=owner,
        created_at=moment,
        public=False,
        expires_at=expires_at,
    )
    run = RunRecord(
        run_id,
        owner,
        session_id,
        record.base_model,
        record.fingerprint,
        record.lora,
        moment,
        moment,
    )
    try:
        rooms.store.save(
            path, copy, lambda to: rooms.store.read(source, lambda folder: _copy_files(folder, to))
        )
        rooms.store.write_run(run)
    except BaseException:
        rooms.store.unclaim_run(run_id)
        _end_archive(rooms, message, session_id, "errored")
        raise
    rooms.sessions.add_run(session_id, run_id)
    _end_archive(rooms, message, session_id, "success")
    return str(path)


def _end_archive(
    rooms: Rooms, message: types.CopyWeightsRequest, session_id: str, reason: str
) -> None:
    """End the session that was made for this copy alone; nobody else would."""
    if message.session_id is None:
        rooms.end_session(session_id, {"type": "client_finished", "reason": {"type": reason}})


def _slot(rooms: Rooms, owner: str, message: types.CopyWeightsRequest) -> tuple[str, str]:
    """The session and the run that the copy goes to: nothing may be there yet, and nobody else gets
    it from now on."""
    if message.session_id is None and message.destination_project_id is not None:
        session_id = _archive_session(rooms.sessions, owner, message.destination_project_id)
        run_id = run_id_of(session_id, 0)
    elif message.session_id is None or message.model_seq_id is None:
        raise RequestError(
            "copy_weights needs destination_project_id, or session_id and model_seq_id"
        )
    else:
        session_id = rooms.sessions.live(message.session_id, owner).session_id
        run_id = run_id_of(session_id, message.model_seq_id)
    if rooms.runs.get(run_id) is not None or not rooms.store.claim_run(run_id):
        raise RequestError(f"{run_id} is taken; copy_weights needs a model_seq_id that is free")
    return session_id, run_id


def _archive_session(sessions: Sessions, owner: str, project_id: str) -> str:
    message = types.CreateSessionRequest(
        tags=[], user_metadata=None, sdk_version="", project_id=project_id
    )
    return sessions.create(owner, message).session_id


def _copy_files(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.name != RECORD:
            shutil.copyfile(file, target / file.name)


def storage_usage(rooms: Rooms, owner: str, project_id: str | None) -> dict[str, Any]:
    """What the owner's checkpoints take on this disk; it costs nothing."""
    sizes = [
        checkpoint.size_bytes
        for run in visible_runs(rooms, owner, project_id)
        for checkpoint in rooms.store.checkpoints(run.run_id)
    ]
    used = {
        "project_id": project_id,
        "user_name": owner,
        "checkpoint_count": len(sizes),
        "size_bytes": sum(sizes),
        "size_gigabytes": sum(sizes) / 1e9,
    }
    return {"data": [used]}
