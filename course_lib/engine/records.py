"""What is written down about a run, a checkpoint, a session? JSON records, replaced in one step."""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from course_lib.engine.requests import RequestError
from course_lib.files import sync, write_whole

UNFINISHED = "~part-"  # prefix of what is being written: never looked at
STALE_S = 24 * 3600  # what nobody has added to for so long is not being written any more
TTL_S = (3600, 10 * 365 * 24 * 3600)

Record = TypeVar("Record")


def now() -> datetime:
    return datetime.now(UTC)


def iso(moment: datetime) -> str:
    return moment.isoformat()


@dataclass(frozen=True)
class RunRecord:
    """One training run: the content of run.json."""

    run_id: str
    owner: str
    session_id: str
    base_model: str
    fingerprint: str  # of the base model's files: the same name may mean another model tomorrow
    lora: dict[str, Any]
    created_at: str
    last_request_at: str
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint: the content of checkpoint.json."""

    path: str
    owner: str
    base_model: str
    fingerprint: str
    lora: dict[str, Any]
    created_at: str
    size_bytes: int = 0
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: str | None = None

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and datetime.fromisoformat(self.expires_at) <= now()


@dataclass(frozen=True)
class SessionRecord:
    """One client session: the content of its JSON file."""

    session_id: str
    owner: str
    created_at: str
    tags: list[str] = field(default_factory=list)
    user_metadata: dict[str, str] | None = None
    project_id: str | None = None
    display_name: str | None = None
    status: dict[str, Any] = field(default_factory=lambda: {"type": "active"})
    training_run_ids: list[str] = field(default_factory=list)
    sampler_ids: list[str] = field(default_factory=list)


def expiry(ttl_seconds: int | None) -> str | None:
    """When a checkpoint saved now with this time to live will expire."""
    if ttl_seconds is None:
        return None
    if not TTL_S[0] <= ttl_seconds <= TTL_S[1]:
        raise RequestError(f"ttl_seconds is {ttl_seconds}; it must be {TTL_S[0]} to {TTL_S[1]}")
    return iso(now() + timedelta(seconds=ttl_seconds))


@contextlib.contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn a full disk, a missing right and the like into the failure of this one request."""
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        remedy = "; free disk space where the engine keeps its store" if full else ""
        raise RequestError(f"Could not save {what}: {error.strerror or error}{remedy}") from error


def read_record(file: Path, record_type: type[Record]) -> Record | None:
    """Read a JSON record; None when it is not there or is not one of ours."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return record_type(**values)
    except (OSError, ValueError, TypeError):
        return None


def write_json(file: Path, values: dict[str, Any], durable: bool = True) -> None:
    """Replace a JSON file in one step; its folder is there, or was deleted and must stay so."""
    write_whole(file, json.dumps(values, indent=1), durable, folders=False)


def stale(folder: Path) -> bool:
    """Whether a folder that cannot be asked for a lock was left behind by a killed process."""
    return time.time() - folder.stat().st_mtime > STALE_S


def sync_folder(folder: Path) -> None:
    """Have the folder and its files on disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)
