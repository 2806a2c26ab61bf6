"""Which sessions were there? Listing them, and finding some by name, metadata or how they ended."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from tinker import types

from course_lib.engine.catalogue import page
from course_lib.engine.records import SessionRecord
from course_lib.engine.requests import NotFoundError
from course_lib.engine.rooms import Rooms


def visible_session(rooms: Rooms, owner: str, session_id: str) -> SessionRecord:
    record = rooms.store.session(session_id)
    if record is None or not (rooms.single_owner or record.owner == owner):
        raise NotFoundError(f"There is no session {session_id}")
    return record


def visible_sessions(rooms: Rooms, owner: str) -> list[SessionRecord]:
    records = rooms.store.sessions()
    return [record for record in records if rooms.single_owner or record.owner == owner]


def session_info(rooms: Rooms, owner: str, session_id: str) -> dict[str, Any]:
    record = visible_session(rooms, owner, session_id)
    return {
        "training_run_ids": record.training_run_ids,
        "sampler_ids": record.sampler_ids,
        "user_metadata": record.user_metadata,
        "display_name": record.display_name,
    }


def session_list(rooms: Rooms, owner: str, limit: int, offset: int) -> dict[str, Any]:
    records, _ = page(visible_sessions(rooms, owner), limit, offset)
    return {"sessions": [record.session_id for record in records]}


def search_sessions(
    rooms: Rooms, owner: str, message: types.SessionSearchRequest
) -> dict[str, Any]:
    """One page of the sessions that match, newest first."""
    found = [
        record for record in visible_sessions(rooms, owner) if _matches(record, message, owner)
    ]
    if message.cursor is not None:
        start = (message.cursor.last_created_at, message.cursor.last_session_id)
        found = [record for record in found if _order(record) < start]
    found.sort(key=_order, reverse=True)
    shown = found[: message.limit]
    more = len(found) > len(shown)
    last = shown[-1] if shown else None
    cursor = last and {"last_created_at": last.created_at, "last_session_id": last.session_id}
    return {
        "sessions": [_summary(rooms, record) for record in shown],
        "next_cursor": cursor if more else None,
    }


def _order(record: SessionRecord) -> tuple[datetime, str]:
    return datetime.fromisoformat(record.created_at), record.session_id


def _matches(record: SessionRecord, message: types.SessionSearchRequest, owner: str) -> bool:
    named = message.session_id is None and message.display_name is None
    named = named or record.session_id == message.session_id
    if message.display_name is not None:
        words, name = message.display_name.lower().split(), (record.display_name or "").lower()
        named = named or all(word in name for word in words)
    wanted, metadata = message.user_metadata, record.user_metadata or {}
    owners = getattr(message.owner, "owner_urns", None)
    return (
        named
        and all(metadata.get(key) == value for key, value in wanted.items())
        and (message.project_ids is None or (record.project_id or "") in message.project_ids)
        and (owners is None or record.owner in owners)
        and (message.statuses is None or any(_has_status(record, s) for s in message.statuses))
    )


def _has_status(record: SessionRecord, query: Any) -> bool:
    reasons = getattr(query, "reasons", None)
    reason = record.status.get("reason", {}).get("type")
    return record.status["type"] == query.type and (reasons is None or reason in reasons)


def _summary(rooms: Rooms, record: SessionRecord) -> dict[str, Any]:
    checkpoints = [c for run in record.training_run_ids for c in rooms.store.checkpoints(run)]
    return {
        "session_id": record.session_id,
        "created_at": record.created_at,
        "owner": record.owner,
        "project_id": record.project_id or "",
        "status": record.status,
        "checkpoints_count": len(checkpoints),
        "display_name": record.display_name,
        "user_metadata": record.user_metadata,
        "checkpoint_storage_bytes": sum(c.size_bytes for c in checkpoints),
    }
